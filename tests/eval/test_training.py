"""Training of learned compressors: resumable to the bit, checked settings, and a file that can be used at once."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import vtc
from vtc.app.loading import load as load_model
from vtc.cli.train import app
from vtc.errors import BudgetError, InputError, VTCError
from vtc.eval.tiny.tasks import TASKS
from vtc.eval.tiny.vocabulary import END, PAD, TOKEN, encode
from vtc.eval.training.calibrations import fitprune
from vtc.eval.training.measure import measure
from vtc.eval.training.prompts import answered, asked, draw
from vtc.eval.training.settings import TrainingSettings, command
from vtc.eval.training.trainer import Trainer, train
from vtc.method import weights
from vtc.method.learned import load
from vtc.methods.fitprune.recipe import left_behind, recipe
from vtc.testing import tiny_inputs, tiny_model

PARAMETERS = {"layers": (0, 2), "bins": 4, "hidden": 4, "target_tokens": 40.0, "temperature": 50.0}
FEW: dict[str, Any] = {"steps": 4, "batch_size": 2, "scenes": 6, "rate": 0.1, "warmup": 1}
SETTINGS = TrainingSettings("atp", PARAMETERS, **FEW)


class Killed(Exception):
    """Stands for the end of a process."""


def run(out: Path, settings: TrainingSettings = SETTINGS, stop: int = 0, **options: Any) -> list[int]:
    steps: list[int] = []

    def note(step: int) -> None:
        steps.append(step)
        if step == stop:
            raise Killed

    quick = {"device": "cpu", "save_every": 2, "check_every": 0, "per_family": 0}
    train(out, settings, on_step=note, **quick | options)
    return steps


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return weights.read(out / "weights.safetensors")[0]


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, stop=3)
    assert run(tmp_path) == [3, 4]  # the checkpoint of step 2
    assert run(tmp_path / "whole", check_every=3, per_family=1) == [1, 2, 3, 4]  # checks change nothing
    first, second = tensors(tmp_path), tensors(tmp_path / "whole")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [3, 4]
    assert {"existence", "mean", "retention", "spread"} <= log[-1]["measured"].keys()
    assert {"answer", "method"} == log[-1]["losses"].keys()
    assert run(tmp_path) == []
    other = TrainingSettings("atp", PARAMETERS, steps=5, batch_size=2, scenes=6)
    with pytest.raises(InputError, match="steps"):
        run(tmp_path, other)


def test_the_result_learned_something_and_can_be_used(tmp_path: Path) -> None:
    run(tmp_path, per_family=1)
    torch.manual_seed(SETTINGS.seed)
    spec = vtc.ModelSpec("llava", 5, 3, True, (0, 1, 2, 3), 6)
    fresh = SETTINGS.compressor().module(spec).state_dict()
    learned, about = weights.read(tmp_path / "weights.safetensors")
    assert fresh.keys() == learned.keys()
    assert all(not torch.equal(fresh[name], learned[name]) for name in fresh if "head_r" in name)
    assert {"base_model", "steps", "seed", "data", "training", "seconds", "held_out"} <= about.keys()
    assert (about["base_model"], about["steps"], about["seed"]) == ("tiny-llava", "4", "0")
    assert json.loads(about["held_out"]).keys() >= {"mean", "retention"}
    method = load(str(tmp_path / "weights.safetensors"))
    assert method == vtc.create("atp", **PARAMETERS, weights=str(tmp_path / "weights.safetensors"))
    result = measure("tiny-llava", method, None, 1)
    assert len(result.layers) == 6 and result.layers[0] == 144
    assert result.retention == pytest.approx(sum(result.layers) / 6 / 144)


def test_a_trained_llm_is_saved_too(tmp_path: Path) -> None:
    settings = TrainingSettings("atp", PARAMETERS, steps=1, batch_size=2, scenes=6, llm_rate=1e-3, warmup=1)
    run(tmp_path, settings, per_family=1)
    from safetensors.torch import load_file

    from vtc.embedded import model_path

    before = load_file(model_path("tiny-llava") / "model.safetensors")
    after = load_file(tmp_path / "model" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any("vision_tower" in name or "projector" in name for name in changed)


def test_a_run_begins_with_what_fits_of_another(tmp_path: Path) -> None:
    """Blocks of another side: all but the kernel of the convolution is the same module."""

    def settings(stride: int, start: str | None = None) -> TrainingSettings:
        parameters = {"stride": stride, "width": 16, "heads": 2}
        return TrainingSettings("quecc", parameters, retention=1 / stride**2, start=start, **FEW)

    first = train(tmp_path / "first", settings(6), device="cpu", check_every=0, per_family=0)
    following = settings(3, str(first))
    with (trainer := Trainer.create(following, tmp_path / "second", torch.device("cpu"))).handle:
        found, stored = trainer.module.state_dict(), weights.read(first)[0]
        other = {name for name, tensor in found.items() if not torch.equal(tensor, stored[name].float())}
        _, about = weights.read(trainer.save_weights({}))
    assert other == {"conv.weight"}
    assert json.loads(about["start"])["parameters"]["stride"] == 6
    assert f"--start {first}" in command(json.loads(about["training"]))
    with pytest.raises(InputError, match="start='atp-tiny-llava' holds no tensor"):
        Trainer.create(settings(3, "atp-tiny-llava"), tmp_path / "third", torch.device("cpu"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"rate": 0.0}, "rate must be above 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"batch_size": 9, "scenes": 8}, "a batch of 9 scenes needs"),
        ({"retention": 0.5}, "'atp' takes no retention"),
        ({"method": "vtc_cls"}, "'vtc_cls' has nothing to learn"),
        ({"task": "tiny_list"}, "task 'tiny_list' is none.*write tiny_image, tiny_detail, tiny_video"),
        ({"method": "apt"}, "did you mean 'atp'"),
        ({"parameters": {"layer": 3}}, "did you mean 'layers'"),
    ],
)
def test_impossible_settings_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(VTCError, match=message):
        TrainingSettings(**{"method": "atp", **given})


def test_an_unknown_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown device 'toaster'"):
        train(tmp_path, SETTINGS, device="toaster")


@pytest.mark.parametrize(
    ("model", "name"),
    [("tiny-llava", "tiny_image"), ("tiny-onevision", "tiny_video"), ("tiny-qwen", "tiny_detail")],
)
def test_labels_cover_the_answer_and_the_end(model: str, name: str) -> None:
    """What the model predicts at the labels is what it answers to the prompt: they stand in their place."""
    loaded, task = load_model(model, dtype="float32"), TASKS[name]
    samples = [task.make(number * task.geometries, "train") for number in range(5)]
    questions = [draw(task, sample.facts, random.Random(seed)) for seed, sample in enumerate(samples)]
    prompts = asked(loaded, task, samples, questions)
    batch = answered(loaded, prompts, questions)
    here = batch["labels"] != -100
    assert here.sum(1).tolist() == [2] * 5
    assert torch.equal(batch["labels"][here], batch["input_ids"][here])
    assert (batch["input_ids"][:, -1] == TOKEN[END]).all()
    assert torch.equal(batch["attention_mask"] == 0, batch["input_ids"] == TOKEN[PAD])
    assert torch.equal(prompts["input_ids"], batch["input_ids"][:, :-2]) and "labels" not in prompts
    with torch.no_grad():
        logits = loaded.model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        replies = loaded.model.generate(**prompts, max_new_tokens=1, do_sample=False)[:, -1]
    assert torch.equal(logits[:, -3].argmax(-1), replies)
    assert (replies == batch["labels"][:, -2]).float().mean() >= 0.8


def test_answers_of_several_words_end_together() -> None:
    loaded, task = load_model("tiny-onevision", dtype="float32"), TASKS["tiny_list"]
    samples = [task.make(number, "train") for number in range(4)]
    questions = [draw(task, sample.facts, random.Random(seed)) for seed, sample in enumerate(samples)]
    batch = answered(loaded, asked(loaded, task, samples, questions), questions)
    for row, question in zip(range(4), questions, strict=True):
        alone = answered(loaded, asked(loaded, task, [samples[row]], [question]), [question])
        real = batch["attention_mask"][row].bool()
        for key in ("input_ids", "labels"):
            assert torch.equal(batch[key][row, real], alone[key][0])
        answer = [*encode(question.answer), TOKEN[END]]
        assert alone["labels"][0, -len(answer) :].tolist() == answer and (alone["labels"] != -100).sum() == len(answer)


def test_any_embedded_model_and_task_is_trained_on(tmp_path: Path) -> None:
    settings = TrainingSettings("atp", {"bins": 4, "hidden": 4}, model="tiny-onevision", task="tiny_video", **FEW)
    run(tmp_path, settings, per_family=1)
    about = weights.read(tmp_path / "weights.safetensors")[1]
    assert about["data"] == "6 samples of tiny_video, split train, one question per row"
    found = measure("tiny-onevision", load(str(tmp_path / "weights.safetensors")), None, 1, task="tiny_video")
    assert set(TASKS["tiny_video"].graded) == set(found.families)
    assert len(found.layers) == 12 and found.layers[0] == pytest.approx(found.tokens)


def test_the_commands(tmp_path: Path) -> None:
    options = [f"--set={name}={value}" for name, value in PARAMETERS.items()]
    sizes = ["--steps=4", "--batch-size=2", "--scenes=6", "--rate=0.1", "--warmup=1", "--check-every=0"]
    arguments = ["train", "--method=atp", f"--out={tmp_path}", *options, *sizes, "--per-family=0", "--device=cpu"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip().endswith("weights.safetensors")
    again = tensors(tmp_path)
    run(tmp_path)
    assert all(torch.equal(value, again[name]) for name, value in tensors(tmp_path).items())


def test_a_calibration_from_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    options = ["--set=layers=(0, 2)", "--prompts=6", "--device=cpu"]
    result = CliRunner().invoke(app, ["calibrate", f"--out={file}", "--retention=0.4", *options])
    assert result.exit_code == 0, result.output
    method = vtc.create("atp_training_free", layers=(0, 2), mode="calibrated", weights=str(file))
    assert 0.2 < measure("tiny-llava", method, None, 1).retention < 0.6
    result = CliRunner().invoke(app, ["calibrate", f"--out={file}", "--retention=0.1", *options])
    assert isinstance(result.exception, BudgetError)


def test_a_recipe_from_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "recipe.safetensors"
    arguments = ["calibrate", "--method=fitprune", f"--out={file}", "--prompts=6", "--device=cpu"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    left = weights.read(file)[0]["left"]
    assert left[0].min() == 1 and left[-1].max() == 0
    assert ((left[1:-1] > 0) & (left[1:-1] < 1)).any()
    assert (left.diff(dim=0) <= 0).all() and (left.diff(dim=1) <= 0).all()
    method = vtc.create("fitprune", weights=str(file))
    assert measure("tiny-llava", method, 0.4, 1).retention == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--method=fitprune", "--retention=0.5"], "leave --retention and --set out"),
        (["--method=fitprune", "--set=layers=3"], "leave --retention and --set out"),
        ([], "write for example --retention 0.33"),
        (["--method=fitprun"], "did you mean 'fitprune'"),
    ],
)
def test_impossible_calibrations_are_refused(given: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["calibrate", f"--out={tmp_path / 'a.safetensors'}", *given])
    assert isinstance(result.exception, VTCError)
    assert message in str(result.exception)


def test_prompts_without_pictures_calibrate_nothing() -> None:
    model = tiny_model("llava-clip")
    with pytest.raises(VTCError, match="hold no image or video; give prompts with pictures"):
        fitprune.calibrate(model, [tiny_inputs("llava-clip", [[4, 5]], model=model)])


def test_a_recipe_is_that_of_the_untouched_model() -> None:
    model = tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", [[4, "image", 3, "image", 5], [2, "image", 12]], seed=2)
    (left,) = fitprune.calibrate(model, [inputs]).values()
    eager = tiny_model("llava-clip", attn_implementation="eager")
    seen: list[torch.Tensor] = []
    for layer in eager.model.language_model.layers[:3]:
        layer.self_attn.register_forward_hook(lambda module, args, output: seen.append(output[1].amax(1)))
    with torch.no_grad():
        eager(**inputs)
    visual = inputs["input_ids"] == eager.config.image_token_id
    counts = []
    for row, first in ((0, 0), (0, 16), (1, 0)):
        image = visual[row].nonzero()[:, 0]
        text = [i for i in range(int(image[0]), visual.shape[1]) if not visual[row, i]]
        place = image[first : first + 16]
        own, cross = (torch.stack([w[row, some].sum(0)[place] for w in seen])[:, None] for some in (image, text))
        counts.append(left_behind(own, cross, torch.ones(1, 16, dtype=torch.bool)))
    expected = recipe(torch.cat(counts, 2), torch.tensor([16, 16, 16]))
    assert float((left - expected).abs().max()) <= 1 / 48 + 1e-6  # a token at the edge
    assert float((left - expected).abs().mean()) <= 1e-3
