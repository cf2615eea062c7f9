"""The short form of `python tests/eval/faults.py`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_disturbed_sweeps_lose_and_double_nothing(tmp_path: Path) -> None:
    """Kills of driver and worker, two kinds of full disks, half a line, in the order that the seed draws."""
    command = [sys.executable, str(Path(__file__).with_name("faults.py")), "--faults", "5", "--seed", "4"]
    run = subprocess.run([*command, "--out", str(tmp_path / "page.md")], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    table = dict(re.findall(r"^\| ([a-z ]+) \| (\d+) \|", (tmp_path / "page.md").read_text(), re.MULTILINE))
    assert sum(map(int, table.values())) == 5 and int(table["driver killed"]) and int(table["worker killed"])
