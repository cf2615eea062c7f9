"""The kernels of `vtc.ops.kernels`: in Triton's interpreter on the CPU, compiled on a GPU, and switched off.

Triton reads at its import whether it interprets, so that the interpreter needs a process of its own: this file.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any
from unittest import mock

import pytest
import torch

from vtc.ops import kernels
from vtc.ops.greedy import k_center, max_sum
from vtc.testing.plain.greedy import scene


def calls() -> list[dict[str, Any]]:
    """Ragged items with gaps, more steps than tokens, equal rows, rows of zeros, one token."""
    long, ties, one = scene(3, 37, 9), scene(2, 70, 5, seed=1), scene(2, 3, 4, seed=2)
    ties["features"] = ties["features"].round()
    ties["features"][0, 5] = 0.0
    one["mask"] = torch.tensor([[False, False, True]]).expand(2, -1)
    made = [(long, 11), (long, 37), (ties, 40), (one, 2)]
    return [{**given, "start": torch.full((len(given["mask"]),), 2), "steps": steps} for given, steps in made]


def compare(device: str) -> int:
    """How many walks of kernels equalled those of torch; what lies behind an item's tokens means nothing."""
    walked, launch = [], kernels.walk
    kernels.walk = lambda *args, **kwargs: walked.append(0) or launch(*args, **kwargs)  # type: ignore[assignment, func-returns-value]
    try:
        for walk, given in itertools.product((max_sum, k_center), calls()):
            there = {key: value.to(device) if torch.is_tensor(value) else value for key, value in given.items()}
            found = walk(**there)
            with mock.patch.dict(os.environ, {"VTC_TRITON": "0"}):
                expected = walk(**there)
            for item, held in enumerate(given["mask"].sum(1).tolist()):
                assert found[item, :held].tolist() == expected[item, :held].tolist(), (walk, given["steps"], item)
    finally:
        kernels.walk = launch
    return len(walked)


def test_interpreted_kernels_walk_as_torch() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{2 * len(calls())} walks of kernels"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_compiled_kernels_walk_as_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compare("cuda") == 2 * len(calls())
    monkeypatch.setenv("VTC_TRITON", "0")
    assert compare("cuda") == 0


def test_they_are_for_gpus_and_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not kernels.usable(torch.zeros(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("VTC_TRITON", "0")
    assert not kernels.usable(torch.zeros(1))


if __name__ == "__main__":
    print(compare("cpu"), "walks of kernels")
