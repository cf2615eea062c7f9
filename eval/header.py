"""`run.json`: what a store was made with, and whether a sweep may add to it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from vtc.errors import InputError
from vtc.eval.asked import Scorable
from vtc.eval.cells import Cell
from vtc.eval.facts import Facts
from vtc.eval.spec import SweepSpec
from vtc.eval.store import Record, Store
from vtc.eval.versions import versions


def documents(spec: SweepSpec, task: Scorable) -> int:
    """How many documents of `task` the sweep asks about."""
    return min(spec.limit or len(task.documents), len(task.documents))


def run_record(
    store: Store, spec: SweepSpec, tasks: Sequence[Scorable], cells: Mapping[str, Sequence[Cell]], facts: Facts
) -> Record:
    """The content of `run.json` once `spec` runs: what is there already, and this sweep; cells: those of each task."""
    run: Record = store.run() if store.exists else {"tasks": {}, "sweeps": []}
    for task in tasks:
        asked = run["tasks"].get(task.name, {}).get("cells", [])
        run["tasks"][task.name] = {
            "fingerprint": task.fingerprint,
            "version": task.version,
            "documents": documents(spec, task),
            "of": len(task.documents),
            "repeats": task.repeats,
            "main_metric": task.main_metric,
            **task.settings(spec.generation),
            "cells": list(dict.fromkeys([*asked, *(cell.key() for cell in cells[task.name])])),
        }
    sweep = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "spec": spec.model_dump(mode="json"),
        "versions": versions(),
        "device": facts.device,
    }
    return {
        "model": {"name": facts.model, "fingerprint": _plain(facts.fingerprint)},
        "seed": spec.seed,
        "generation": _plain(spec.generation),
        "video": spec.video.settings(),
        "tasks": run["tasks"],
        "sweeps": [*run["sweeps"], sweep],
    }


def check_same_sweep(store: Store, spec: SweepSpec, tasks: Sequence[Scorable], cells: Sequence[Cell]) -> None:
    """Refuse to add to a store whose answers could not stand beside the new ones.

    Raises:
        InputError: another model, seed or generation override, or a task that has changed since.
    """
    run = store.run()
    where = f"{str(store.folder)!r} holds a sweep"
    there, here = run["model"]["fingerprint"], _plain(cells[0].model)
    if there != here:
        changed = [f"{key} {there.get(key)!r} there, {here[key]!r} here" for key in here if there.get(key) != here[key]]
        raise InputError(f"{where} of {run['model']['name']!r} ({'; '.join(changed)}); choose another --out")
    settings = {"seed": spec.seed, "generation": _plain(spec.generation), "video": spec.video.settings()}
    for setting, now in settings.items():
        if run.get(setting, {}) != now:  # stores from before videos could be swept say nothing of them
            raise InputError(f"{where} with {setting} {run.get(setting)!r}, not {now!r}; choose another --out")
    for task in tasks:
        stored = run["tasks"].get(task.name)
        if stored is not None and stored["fingerprint"] != task.fingerprint:
            raise InputError(
                f"{where} of task {task.name!r} as it was before its settings, code or data changed"
                f" (version {stored['version']} there, {task.version} here); choose another --out"
            )


def changes_since(store: Store, spec: SweepSpec) -> list[str]:
    """What differs from the last sweep in this store and may be worth knowing: library versions, the batch size."""
    if not store.exists:
        return []
    last = store.run()["sweeps"][-1]
    now, before = versions(), last["versions"]
    changed = [f"{name} {before[name]} -> {now[name]}" for name in now if before.get(name, now[name]) != now[name]]
    notes = [f"stored answers were made with other versions: {', '.join(changed)}"] if changed else []
    if last["spec"]["batch_size"] != spec.batch_size:
        notes.append(f"stored answers were made in batches of {last['spec']['batch_size']}, not {spec.batch_size}")
    return notes


def _plain(settings: Mapping[str, Any]) -> Any:
    """`settings` as they are after a round trip through JSON."""
    return json.loads(json.dumps(dict(settings), default=str))
