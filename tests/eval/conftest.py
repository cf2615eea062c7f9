"""A model with random weights and small local tasks, so that the harness runs end to end in seconds."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

TASK_CODE = """
from PIL import Image

COLOURS = ["red", "green", "blue", "yellow"]


def doc_to_visual(doc):
    picture = Image.new("RGB", (120, 90), COLOURS[doc["scene"] % 4])
    picture.paste(COLOURS[(doc["scene"] + doc["shift"]) % 4], (10, 10, 50, 70))
    return [picture]


def text_only(doc):
    return []


def process_results(doc, results):
    hit = float(results[0].strip() == doc["answer"])
    entry = {"score": hit, "scene": str(doc["scene"]), "guess": results[0]}
    return {"accuracy": entry, doc["family"]: entry}


def mean(items):
    return sum(item["score"] for item in items) / len(items)


def broken(doc, results):
    if results[0] not in ("", "yes"):  # a rehearsal with made-up answers passes
        raise RuntimeError("no judge")
    return {"accuracy": {"score": 0.0, "scene": "0", "guess": ""}}
"""

TASK_YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {output_type}
doc_to_visual: !function utils.{visual}
doc_to_text: question
doc_to_target: answer
process_results: !function utils.{process}
{generation}
cluster_key: scene
metric_list:
  - {{metric: accuracy, aggregation: !function utils.mean, higher_is_better: true}}
  - {{metric: colour, aggregation: !function utils.mean, higher_is_better: true}}
  - {{metric: place, aggregation: !function utils.mean, higher_is_better: true}}
metadata: {{version: 2.0}}
"""
GENERATION = "generation_kwargs: {max_new_tokens: 3, temperature: 0, do_sample: false}"

WriteTask = Callable[..., Path]


@pytest.fixture(scope="session")
def write_task() -> WriteTask:
    """A function that writes a local lmms-eval task into a folder."""

    def write(
        folder: Path,
        name: str = "blobs",
        *,
        documents: int = 10,
        output_type: str = "generate_until",
        visual: str = "doc_to_visual",
        process: str = "process_results",
        generation: str = GENERATION,
    ) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        questions = {"colour": "What color is the ring?", "place": "Where is the red ring relative to the blue star?"}
        lines = [
            {
                "scene": number // 2,
                "shift": 1 + number // 2 % 3,
                "family": (family := ("colour", "place")[number % 2]),
                "question": questions[family],
                "answer": ("red", "left")[number % 2],
            }
            for number in range(documents)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "utils.py").write_text(TASK_CODE)
        settings = {"output_type": output_type, "visual": visual, "process": process, "generation": generation}
        (folder / f"{name}.yaml").write_text(TASK_YAML.format(name=name, data=f"{name}.jsonl", **settings))
        return folder

    return write


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory, write_task: WriteTask) -> Path:
    """A folder with the task `blobs`: ten questions about five pictures, two families, clusters named by scene."""
    return write_task(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of a LLaVA with random weights and the small model's processor."""
    from vtc.eval.tiny.export import export
    from vtc.eval.tiny.model import ModelShape, build_model

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("models") / "blind"
    model = build_model(ModelShape(32, vision_layers=3, text_layers=2, heads=2, vision_inner=64, text_inner=64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 6.0 if parameter.dim() == 2 else 1.0  # else every answer is the same word
    export(model, folder)
    return folder


@pytest.fixture(scope="session")
def runner(model_folder: Path) -> Any:
    """A runner on that model."""
    from vtc.app import loading
    from vtc.eval.runner import Runner

    return Runner(loading.load(str(model_folder), device="cpu"))


@pytest.fixture(scope="session")
def blobs(task_folder: Path) -> Any:
    """The loaded task `blobs`."""
    from vtc.eval.catalogue import load_tasks

    return load_tasks(["blobs"], [task_folder])[0]


def _video_model(name: str, folder: Path) -> Path:
    from vtc.eval.tiny.export import export
    from vtc.eval.tiny.family import Family
    from vtc.eval.tiny.onevision import OneVision
    from vtc.eval.tiny.qwen import Qwen

    small = {"hidden": 64, "vision_layers": 2, "vision_inner": 96, "text_layers": 3, "text_inner": 96}
    family: Family = {"onevision": OneVision, "qwen": Qwen}[name](**small)
    torch.manual_seed(0)
    export(family.build("sdpa"), folder, family.processor())
    return folder


@pytest.fixture(scope="session", params=["onevision", "qwen"])
def video_model_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of a small model with random weights that takes pictures and videos."""
    return _video_model(request.param, tmp_path_factory.mktemp("models") / request.param)


WriteStore = Callable[..., Path]


@pytest.fixture(scope="session")
def write_store() -> WriteStore:
    """A function that writes the store of a scored sweep by hand, without a model.

    `cells` are (method, retention) or (method, retention, seed), `scores[task][n]` the scores of cell n by document,
    `clusters[task]` numbers. Visual tokens kept are the retention's share of 100.
    """
    from vtc.eval.scoring import scoring_of
    from vtc.eval.store import Store

    def write(
        folder: Path,
        cells: list[tuple[Any, ...]],
        scores: dict[str, list[list[float]]],
        *,
        clusters: dict[str, list[int]] | None = None,
        model: str = "tiny",
        fingerprint: str = "f",
        texts: bool = True,
    ) -> Path:
        keys = [f"k{number}" for number in range(len(cells))]
        tasks, metrics, rows = {}, [], []
        for task, of_cells in scores.items():
            n = len(of_cells[0])
            tasks[task] = {
                "fingerprint": fingerprint, "version": "1", "documents": n, "of": n, "repeats": 1,
                "main_metric": "accuracy", "cluster_key": None, "prompt_profile": "default", "generation": {},
                "until": [], "cells": keys,
            }  # fmt: skip
            for key, (method, retention, *_), values in zip(keys, cells, of_cells, strict=True):
                kept = 100.0 * (retention or 0.3)
                value = sum(values) / n
                first = sum(of_cells[0]) / n
                metrics.append({
                    "cell": key, "task": task, "task_fp": fingerprint, "documents": n, "metric": "accuracy",
                    "value": value, "ci_low": max(0.0, value - 0.1), "ci_high": min(1.0, value + 0.1),
                    "ci_method": "Wilson", "n": n, "higher_is_better": True, "visual_tokens_in": 100.0,
                    "visual_tokens_kept": kept, "output_tokens": 1.0, "scoring": scoring_of(fingerprint),
                    "scores": {str(doc): score for doc, score in enumerate(values)}, "scale": 1.0,
                    "clusters": None if clusters is None else clusters[task], "kept": [kept] * n,
                    "seconds": 0.01 * kept,
                    **({} if method == "none" else {
                        "diff": value - first, "diff_ci_low": value - first - 0.1, "diff_ci_high": value - first + 0.1,
                        "p": 0.01, "n_up": 0, "n_down": 1, "diff_method": "McNemar"}),
                })  # fmt: skip
                if texts:
                    rows += [
                        {"cell": key, "task": task, "task_fp": fingerprint, "doc_id": doc, "repeat": 0,
                         "text": f"answer {score:g}"}
                        for doc, score in enumerate(values)
                    ]  # fmt: skip
        records = [
            {"cell": key, "label": method if not seed else f"{method}(seed={seed[0]})", "method": method, "version": 1,
             "parameters": {"seed": seed[0]} if seed else {}, "retention": retention, "positions": None, "seed": 0,
             "generation": {}, "model": {}}
            for key, (method, retention, *seed) in zip(keys, cells, strict=True)
        ]  # fmt: skip
        spec = {"methods": [], "retentions": [], "limit": None, "include_path": []}
        sweep = {"started": "2026-01-01T00:00:00+00:00", "spec": spec, "versions": {"torch": "2"}, "device": "cpu"}
        content = {
            "model": {"name": model, "fingerprint": {"name": model}},
            "seed": 0,
            "generation": {},
            "tasks": tasks,
        }
        with Store(folder).writing() as writer:
            writer.save_run({**content, "sweeps": [sweep]})
            writer.add_cells(records)
            writer.add_rows(rows)
            for record in metrics:
                writer.add_metrics([record])
        return folder

    return write


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """A function that runs `vtc` in this process: exit status, stdout, stderr."""
    import vtc.cli

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vtc", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            vtc.cli.main()
        captured = capfd.readouterr()
        code: Any = end.value.code
        return code or 0, captured.out, captured.err

    return run
