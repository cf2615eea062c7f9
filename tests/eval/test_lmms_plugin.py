"""`python -m lmms_eval --model vtc`: found by its entry point, same answers as a sweep."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from vtc.app import loading
from vtc.errors import InputError, VTCError
from vtc.eval.quiet import muted


@pytest.fixture(scope="module")
def plugin() -> Any:
    """The class that lmms-eval finds under the name `vtc`."""
    with muted():
        from lmms_eval.models import get_model

        return get_model("vtc")


def test_the_class_is_found_by_its_entry_point(plugin: Any) -> None:
    assert plugin.__module__ == "vtc.eval.lmms_model" and plugin.is_simple is False


def test_it_answers_what_a_sweep_answers(
    plugin: Any, model_folder: Path, task_folder: Path, blobs: Any, runner: Any
) -> None:
    with muted():
        from lmms_eval.evaluator import simple_evaluate
        from lmms_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(task_folder), include_defaults=False)
        arguments = f"pretrained={model_folder},method=random,retention=0.1,seed=5,device=cpu"
        result = simple_evaluate(
            "vtc", model_args=arguments, tasks=["blobs"], task_manager=manager, batch_size=3, bootstrap_iters=0
        )
    samples = result["samples"]["blobs"]
    lm = plugin(pretrained=str(model_folder), method="random", retention="0.1", seed="5", device="cpu")
    batch = runner.prepare([blobs.conversation(doc_id) for doc_id in range(10)])
    expected = [answer.text for answer in runner.answer(batch, lm.cell, blobs.generation({}))]
    assert [sample["resps"][0][0] for sample in samples] == expected
    assert result["throughput"]["avg_visual_tokens_kept"] == 14.0
    assert samples[0]["token_counts"][0]["output_tokens"] >= 1


def test_a_model_on_disk_is_asked_where_it_computes(
    plugin: Any, model_folder: Path, blobs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate")
    given: dict[str, Any] = {"pretrained": str(model_folder), "method": "vtc_cls", "retention": 0.5}
    whole = plugin(**given, device="cpu")
    monkeypatch.setattr(loading, "load", functools.partial(loading.load, max_memory={"cpu": "100KB"}))
    spread = plugin(**given, device="balanced")
    assert any(weight.is_meta for weight in spread.runner.model.parameters()) and spread.device == whole.device
    prompts = [blobs.conversation(doc_id) for doc_id in range(3)]
    found = [lm._answered(prompts, blobs.generation({}), 0) for lm in (whole, spread)]
    assert [answer.text for answer in found[0]] == [answer.text for answer in found[1]]


def test_unknown_arguments_are_refused(plugin: Any, model_folder: Path) -> None:
    with pytest.raises(VTCError, match="did you mean 'seed'"):
        plugin(pretrained=str(model_folder), method="random", sed=1)
    with pytest.raises(VTCError, match="did you mean 'random'"):
        plugin(pretrained=str(model_folder), method="randm")
    with pytest.raises(VTCError, match="unknown model argument 'retension'; did you mean 'retention'"):
        plugin(pretrained=str(model_folder), method="random", retension=0.5)
    with pytest.raises(VTCError, match="unknown model argument 'frame'; did you mean 'frames'"):
        plugin(pretrained=str(model_folder), frame=8)
    with pytest.raises(VTCError, match="model_args retention need a method"):
        plugin(pretrained=str(model_folder), retention=0.5)
    with pytest.raises(VTCError, match="retention_rate"):
        plugin(pretrained=str(model_folder), retention_rate=0.5)


def test_a_method_with_a_budget_does_not_run_without_one(plugin: Any, model_folder: Path) -> None:
    with pytest.raises(VTCError, match=r"retention=0\.25 or keep=64"):
        plugin(pretrained=str(model_folder), method="random")
    with pytest.raises(VTCError, match="model_args retention need a method"):
        plugin(pretrained=str(model_folder), retention=0.5)
    with pytest.raises(VTCError, match="keep='many' is no number"):
        plugin(pretrained=str(model_folder), method="random", keep="many")


def test_budgets_of_every_kind(plugin: Any, model_folder: Path, blobs: Any) -> None:
    def kept(**given: Any) -> float:
        lm = plugin(pretrained=str(model_folder), device="cpu", **given)
        batch = lm.runner.prepare([blobs.conversation(0)])
        return float(lm.runner.answer(batch, lm.cell, blobs.generation({}))[0].visual_tokens_kept)

    assert kept(method="random", keep="10") == 10
    assert kept(method="fastv", ratio=0.5, layer=1) == (144 + 72) / 2  # two layers
    assert kept(method="random@0.25+mustdrop(merge=off,filter=off,layers=[0],depth=null)") == 36
    assert kept(method="mustdrop", merge="off", filter="off", layers="[0]", depth="null") == 144


@pytest.mark.parametrize(
    ("given", "most", "expected"), [("3", None, 3), (2, 1, 2), ("auto", None, 8), ("auto:4", 5, 5), ("auto", "64", 8)]
)
def test_batch_sizes(plugin: Any, model_folder: Path, given: Any, most: Any, expected: int) -> None:
    assert plugin(pretrained=str(model_folder), batch_size=given, max_batch_size=most).batch_size == expected


@pytest.mark.parametrize("given", [0, "-1", "many", "1.5"])
def test_batch_sizes_that_make_no_sense(plugin: Any, given: Any) -> None:
    with pytest.raises(VTCError, match="batch_size="):
        plugin(batch_size=given)


def test_lmms_eval_finds_the_package_tasks_in_the_folder_that_tasks_prints() -> None:
    command = [sys.executable, "-m", "vtc", "tasks", "--path"]
    folder = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    with muted():
        from lmms_eval.tasks import TaskManager

        manager = TaskManager(include_path=folder, include_defaults=False, model_name="vtc")
    assert "tiny_image" in manager.all_tasks


def test_the_untouched_model_is_the_default(plugin: Any, model_folder: Path) -> None:
    assert plugin(pretrained=str(model_folder)).cell.is_baseline


def test_a_document_that_cannot_be_read_is_named(
    plugin: Any, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where Pillow is set to fill up broken files, which importing lmms-eval does."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file := tmp_path / "broken.jpg")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    lm = plugin(pretrained=str(model_folder), device="cpu")
    lm.task_dict = {"t": {"test": {4: {"file": str(file)}}}}

    def to_messages(document: dict[str, str]) -> list[dict[str, Any]]:
        with Image.open(document["file"]) as picture:
            return [{"role": "user", "content": [{"type": "image", "url": picture.convert("RGB")}]}]

    arguments = ("", to_messages, {"max_new_tokens": 1}, 4, "t", "test")
    with pytest.raises(InputError, match="task 't', document 4 cannot be read: image file is truncated"):
        lm.generate_until([SimpleNamespace(args=arguments)])
