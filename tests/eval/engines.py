"""`python tests/eval/engines.py` writes docs/results/engines.md: a sweep by one process, by two, and by two of Ray."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vtc.app.pages import page
from vtc.eval.quiet import muted
from vtc.eval.store import Store, row_key

PAGE = Path(__file__).parents[2] / "docs" / "results" / "engines.md"
SWEEP = ("--methods", "random,vtc_cls,fastv", "--retentions", "0.5,0.25", "--batch-size", "8", "--device", "cpu")
ENGINES = {
    "one process": ("--engine", "local"),
    "two processes": ("--engine", "local", "--workers", "2"),
    "Ray, two workers": ("--engine", "ray", "--workers", "2"),
}


def swept(out: Path, limit: int, engine: tuple[str, ...]) -> float:
    """Run the sweep into `out`; the seconds it took."""
    began = time.monotonic()
    command = [sys.executable, "-m", "vtc", "sweep", *SWEEP, "--limit", str(limit), "--out", str(out), *engine]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def recorded(folder: Path) -> dict[Any, Any]:
    """All that is stored by answer: rows but for their timings, and the tokens that were kept."""
    store = Store(folder)
    rows = list(store.rows())
    found = {row_key(row): {k: v for k, v in row.items() if not k.endswith("seconds")} for row in rows}
    assert len(found) == len(rows), f"{len(rows) - len(found)} rows are doubled"
    return {**found, **{("kept", *row_key({**each, "repeat": 0})): each for each in store.kept()}}


def compare(folder: Path, limit: int) -> list[list[str]]:
    """The sweep by every engine; a line of each: seconds, rows, records of kept tokens, and how many differ."""
    lines, wanted = [], None
    for name, engine in ENGINES.items():
        out = folder / name.replace(" ", "_")
        seconds = swept(out, limit, engine)
        found = recorded(out)
        wanted = found if wanted is None else wanted
        different = sum(found.get(key) != wanted.get(key) for key in found.keys() | wanted.keys())
        kept = sum(key[0] == "kept" for key in found)
        tables = [(each / "metrics.csv").read_bytes() for each in (folder / "one_process", out)]
        table = "equal" if tables[0] == tables[1] else "differs"
        lines.append([name, str(len(found) - kept), str(kept), str(different), table, f"{seconds:.0f}"])
        sys.stderr.write(f"{lines[-1]}\n")
    return lines


def main() -> None:
    """Run the sweeps, write the page; exit status 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--out", type=Path, default=PAGE)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, muted():
        lines = compare(Path(folder), given.limit)
    words = (
        f"`vtc sweep {' '.join(SWEEP)} --limit {given.limit}` on tiny-llava by every engine: rows of answers, records "
        "of kept tokens, how many of both differ from those of one process in more than seconds, whether metrics.csv "
        "is the same byte by byte, and wall seconds of the command, on two cores that did other things as well. "
        "Where a model answers in milliseconds, most of them go into starting processes."
    )
    head = ["engine", "rows", "records", "different", "metrics.csv", "seconds"]
    packages = ("torch", "transformers", "lmms-eval", "ray")
    text = page("One sweep, three engines", "python tests/eval/engines.py", words, (head, lines), packages=packages)
    given.out.write_text(text)
    sys.exit(any(line[3] != "0" or line[4] != "equal" for line in lines))


if __name__ == "__main__":
    main()
