"""What libraries do to a process while they are muted."""

from __future__ import annotations

import copy
import os

import pytest

from vtc.eval.quiet import muted


def test_what_replaces_the_environment_is_put_back_with_its_values(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As `datasets.Dataset.map` does with several processes."""
    monkeypatch.setenv("VTC_GOES", "1")
    own = os.environ
    with muted():
        print("not seen")
        os.environ = copy.deepcopy(os.environ)  # noqa: B003
        os.environ["VTC_NEW"] = "2"
        del os.environ["VTC_GOES"]
    assert os.environ is own
    assert own.pop("VTC_NEW") == "2" and "VTC_GOES" not in own
    assert "not seen" not in capfd.readouterr().out
