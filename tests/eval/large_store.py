"""`python tests/eval/large_store.py CELLS DOCUMENTS FOLDER` makes a store, and says in JSON what reading it costs."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vtc.eval.report import write_report
from vtc.eval.scoring import scoring_of
from vtc.eval.store import Store

ABOUT = {"task": "t", "task_fp": "f"}


def make(folder: Path, cells: int, documents: int) -> None:
    """A store as sweeps leave it, block by block, with one metric per cell; no model and no task behind it."""
    folder.mkdir(parents=True)
    keys = [f"{number:016x}" for number in range(cells)]
    task = {
        **{"fingerprint": "f", "version": "1", "documents": documents, "of": documents, "repeats": 1, "cells": keys},
        **{"main_metric": "m", "cluster_key": None, "prompt_profile": "default", "generation": {}, "until": []},
    }
    spec = {"retentions": [0.5], "batch_size": 100, "methods": [], "tasks": ["t"]}
    sweep = {"started": "2026-01-01", "spec": spec, "versions": {}, "device": "cpu"}
    run = {"model": {"name": "x", "fingerprint": {}}, "seed": 0, "generation": {}, "tasks": {"t": task}}
    (folder / "run.json").write_text(json.dumps(run | {"sweeps": [sweep]}))
    with (folder / "cells.jsonl").open("w") as file:
        for number, key in enumerate(keys):
            cell = {"cell": key, "label": f"m{number // 5}", "method": "m", "version": 1, "parameters": {}, "seed": 0}
            file.write(json.dumps(cell | {"retention": 0.1 * (1 + number % 5), "positions": None}) + "\n")
    answer = {
        **{"text": "an answer of some words", "input_tokens": 600, "output_tokens": 7, "visual_tokens_in": 576},
        **{"visual_tokens_kept": 288.0, "seconds": 0.0123, "engine_seconds": 0.001},
    }
    with (folder / "rows.jsonl").open("w") as file:
        for first in range(0, documents, 100):
            for key in keys:
                for doc_id in range(first, min(documents, first + 100)):
                    file.write(json.dumps({"cell": key, **ABOUT, "repeat": 0, "doc_id": doc_id, **answer}) + "\n")
    with (folder / "metrics.jsonl").open("w") as file:
        for key in keys:
            metric = {
                **{"cell": key, **ABOUT, "documents": documents},
                **{"scoring": scoring_of("f"), "metric": "m", "value": 0.5, "ci_low": 0.4, "ci_high": 0.6},
                **{"n": documents, "visual_tokens_in": 576.0, "visual_tokens_kept": 288.0, "output_tokens": 7.0},
                **{"higher_is_better": True, "diff": None, "diff_ci_low": None, "diff_ci_high": None, "p": None},
                **{"n_up": None, "n_down": None, "ci_method": "Wilson", "diff_method": None, "left_out": []},
                "scores": {str(doc_id): float(doc_id % 2) for doc_id in range(documents)},
            }
            file.write(json.dumps({"cell": key, **ABOUT, "documents": documents, "metrics": [metric]}) + "\n")


def measured(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds of `work`, and by how many MiB it raised the peak of this process."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    work()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": time.perf_counter() - began, "MiB": (after - before) / 1024}


def read_all(folder: Path) -> int:
    """What a resumed sweep and scoring read: the index, then one cell's rows after the other's."""
    store, count = Store(folder), 0
    with store.writing() as writer:
        for key in store.cells():
            rows = list(store.rows_at(writer.seen.places(key, ("t", "f"))))
            count += len(rows)
        assert count == len(writer.seen)
    return count


def main(cells: int, documents: int, folder: Path) -> None:
    """Make a small and a large store; the small one is read first, so that imports and fonts are there."""
    make(folder / "small", 2, 100)
    make(folder / "large", cells, documents)
    write_report(folder / "small")
    read_all(folder / "small")
    resumed = measured(lambda: read_all(folder / "large"))
    report = measured(lambda: write_report(folder / "large"))
    sys.stdout.write(json.dumps({"rows": cells * documents, "resume": resumed, "report": report}) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
