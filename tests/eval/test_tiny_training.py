"""A training run can be killed at any moment and ends with the same weights; its settings are checked."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from vtc.cli.tiny import app
from vtc.embedded import NAMES, model_path
from vtc.errors import InputError, UnknownName, VTCError
from vtc.eval.tiny import loop
from vtc.eval.tiny.benchmark import task_rows
from vtc.eval.tiny.checking import accuracy
from vtc.eval.tiny.mixed_batches import mixed, plan, streams
from vtc.eval.tiny.mixture import take_over, train_mixture
from vtc.eval.tiny.model import ModelShape
from vtc.eval.tiny.optim import make_optimisers, orthogonal_in, rate, set_rate
from vtc.eval.tiny.recipes import RECIPES, Recipe
from vtc.eval.tiny.record import add_accuracy
from vtc.eval.tiny.settings import Settings
from vtc.eval.tiny.stream import render_ahead
from vtc.eval.tiny.tables import document
from vtc.eval.tiny.tasks import TASKS
from vtc.eval.tiny.train import train

SHAPE = ModelShape(hidden=32, vision_layers=2, text_layers=2, heads=2, vision_inner=32, text_inner=32)
SETTINGS = Settings(steps_tower=3, steps_joint=5, batch_size=2, scenes=6, shape=SHAPE)
KILLED = """
import os, signal, sys
from pathlib import Path
from vtc.eval.tiny.model import ModelShape
from vtc.eval.tiny.settings import Settings
from vtc.eval.tiny.train import train

def kill(stage, step):
    if (stage, step) == ("joint", 3):
        os.kill(os.getpid(), signal.SIGKILL)

shape = ModelShape(hidden=32, vision_layers=2, text_layers=2, heads=2, vision_inner=32, text_inner=32)
settings = Settings(steps_tower=3, steps_joint=5, batch_size=2, scenes=6, shape=shape)
train(Path(sys.argv[1]), settings, device="cpu", threads=1, workers=0, save_every=2, on_step=kill)
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _run(out: Path, steps: list[tuple[str, int]]) -> Path:
    def note(stage: str, step: int) -> None:
        steps.append((stage, step))

    return train(out, SETTINGS, device="cpu", workers=0, save_every=2, on_step=note)


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "killed"], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    (tmp_path / "killed" / "state.pt.part").write_bytes(b"torn")
    resumed: list[tuple[str, int]] = []
    first = _run(tmp_path / "killed", resumed)
    assert resumed == [("joint", 3), ("joint", 4), ("joint", 5)]
    whole: list[tuple[str, int]] = []
    second = _run(tmp_path / "whole", whole)
    assert len(whole) == 8
    a, b = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    record = json.loads((first / "training.json").read_text())
    assert record["settings"]["steps_joint"] == 5 and "torch" in record["versions"]
    log = [json.loads(line) for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in log] == [("tower", 3), ("joint", 5)]
    assert {"existence", "patch kind"} <= log[-1]["measured"].keys()

    finished: list[tuple[str, int]] = []
    _run(tmp_path / "whole", finished)
    assert finished == []
    other = Settings(steps_tower=3, steps_joint=6, batch_size=2, scenes=6, shape=SHAPE)
    with pytest.raises(InputError, match="steps_joint"):
        train(tmp_path / "whole", other, device="cpu", workers=0)


@pytest.mark.parametrize("wrong", [{"steps_tower": 0}, {"seed": -1}, {"batch_size": 9, "scenes": 8}])
def test_impossible_settings_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError):
        Settings(**wrong)  # type: ignore[arg-type]


def test_an_unknown_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="toaster"):
        train(tmp_path, SETTINGS, device="toaster")


def test_the_rate_warms_up_and_falls_to_its_floor() -> None:
    for stage in Settings().stages:
        rates = [rate(stage, step) for step in range(stage.steps)]
        assert rates[0] == pytest.approx(stage.rate / stage.warmup, rel=1e-3)
        assert max(rates) <= stage.rate
        assert rates[stage.warmup :] == sorted(rates[stage.warmup :], reverse=True)
        assert rates[-1] == pytest.approx(stage.rate * stage.floor, rel=0.01)


def test_model_path_knows_its_names() -> None:
    assert all(model_path(name).name == name for name in NAMES)
    with pytest.raises(UnknownName, match="tiny-llava"):
        model_path("tiny-lava")


def test_the_commands_explain_themselves() -> None:
    for command in ("train", "render", "check", "questions", "table"):
        result = CliRunner().invoke(app, [command, "--help"])
        assert result.exit_code == 0
    assert CliRunner().invoke(app, ["check", "--per-family", "0"]).exit_code == 2


SIZES = tuple({"hidden": 32, "vision_layers": 2, "vision_inner": 32, "text_layers": 2, "text_inner": 32}.items())
MIXTURE = Recipe("tiny-onevision", steps_tower=2, steps_joint=5, batch_size=2, different=10, sizes=SIZES)
KILLED_MIXTURE = """
import os, signal, sys
from pathlib import Path
from vtc.eval.tiny.recipes import Recipe
from vtc.eval.tiny.mixture import take_over, train_mixture

def kill(stage, step):
    if (stage, step) == ("joint", 3):
        os.kill(os.getpid(), signal.SIGKILL)

recipe = Recipe("tiny-onevision", steps_tower=2, steps_joint=5, batch_size=2, different=10, sizes=@SIZES@)
train_mixture(Path(sys.argv[1]), recipe, device="cpu", threads=1, save_every=2, on_step=kill)
""".replace("@SIZES@", repr(SIZES))


def test_a_mixture_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_MIXTURE, tmp_path / "killed"]
    killed = subprocess.run(command, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    resumed: list[tuple[str, int]] = []

    def note(stage: str, step: int) -> None:
        resumed.append((stage, step))

    first = train_mixture(tmp_path / "killed", MIXTURE, device="cpu", save_every=2, on_step=note)
    assert resumed == [("joint", 3), ("joint", 4), ("joint", 5)]
    render_ahead(streams(MIXTURE, tmp_path / "whole" / "samples"))  # another process may have rendered before
    second = train_mixture(tmp_path / "whole", MIXTURE, device="cpu")
    a, b = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert sum(path.stat().st_size for path in first.iterdir()) < 8_000_000
    log = [json.loads(line) for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in log] == [("tower", 2), ("joint", 5)]
    assert {"image/existence", "patch kind"} <= log[-1]["measured"].keys()

    folder = first
    rows = task_rows(TASKS["tiny_list"], 2, "check", 100_000)
    shares = accuracy(folder, rows, task="tiny_list")
    assert set(shares) == {"objects", "words", "digits", "mean"} and all(0 <= share <= 1 for share in shares.values())
    add_accuracy(folder, shares, 2, "tiny_list")
    assert f"| mean |  | {100 * shares['mean']:.1f} |" in document({"tiny-onevision": folder})


def test_recipes_fit_the_repository_and_mix_what_their_model_reads() -> None:
    assert set(RECIPES) == {"tiny-onevision", "tiny-qwen", "tiny-internvl"}
    for name, recipe in RECIPES.items():
        model = recipe.family().build()
        assert 2 * sum(parameter.numel() for parameter in model.parameters()) < 8_000_000
        assert model.config.get_text_config().num_hidden_layers >= 12
        assert ("tiny_video" in {task.name for task, _ in mixed(recipe)}) == (name != "tiny-internvl")
        assert plan(recipe, 50) == plan(recipe, 60)[:50]
    with pytest.raises(UnknownName, match="tiny-qwen"):
        Recipe("tiny-quen").family()


@pytest.mark.parametrize("wrong", [{"steps_tower": 0}, {"seed": -1}, {"batch_size": 0}])
def test_impossible_recipes_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError):
        Recipe("tiny-onevision", **wrong)  # type: ignore[arg-type]


def test_another_class_starts_with_the_same_language_model() -> None:
    model = RECIPES["tiny-qwen"].family().build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    taken = take_over(model, "tiny-onevision")
    trained = AutoModelForImageTextToText.from_pretrained(
        model_path("tiny-onevision"), dtype=torch.float32
    ).state_dict()
    assert set(taken) == {name for name in before if "language_model" in name or "lm_head" in name}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, trained[name] if name in taken else before[name]), name


def test_a_folder_of_the_same_class_gives_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = RECIPES["tiny-onevision"].family().build()
    assert len(take_over(model, str(model_path("tiny-onevision")))) == len(model.state_dict())
    (tmp_path / "tiny-onevision").mkdir()  # as a run may be called: the name is that of the embedded model all the same
    monkeypatch.chdir(tmp_path)
    assert len(take_over(model, "tiny-onevision")) == len(model.state_dict())
    with pytest.raises(InputError, match=r"holds no config\.json"):
        take_over(model, str(tmp_path / "tiny-onevision"))


def test_products_are_in_bfloat16_only_where_the_hardware_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    left = torch.randn(4, 4)
    for vectors, tiles in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda answer=vectors: answer)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda answer=tiles: answer)
        with loop.mixed(torch.device("cpu")):
            assert (left @ left).dtype == (torch.bfloat16 if vectors or tiles else torch.float32)
    assert loop.products(torch.device("cuda")) == torch.bfloat16


def test_muon_is_orthogonal_in_the_type_that_is_asked_for() -> None:
    gradient = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    steps = []
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.nn.Parameter(torch.zeros(24, 8))
        weight.grad = gradient.clone()
        muon, _ = make_optimisers([("layer", weight), ("embed", torch.nn.Parameter(torch.zeros(1)))], 0.0)
        set_rate([muon], 1.0)
        with orthogonal_in(dtype):
            muon.step()
        steps.append(weight.detach())
    assert not torch.equal(*steps) and torch.allclose(*steps, atol=0.05)


def test_tiny_llava_starts_from_nothing(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["train", "--out", str(tmp_path / "run"), "--start", "tiny-onevision"])
    assert isinstance(result.exception, InputError) and "leave --start away" in str(result.exception)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["tiny_vide=1"], "tiny_video"),
        (["tiny_video=much"], "tiny_video=0.3"),
        (["tiny_video=0"], "above 0"),
        (["tiny_video=nan"], "above 0"),
    ],
)
def test_shares_are_tasks_with_a_number_above_zero(given: list[str], said: str, tmp_path: Path) -> None:
    command = ["train", "--model", "tiny-qwen", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, [*command, *(word for text in given for word in ("--share", text))])
    assert isinstance(result.exception, VTCError) and said in str(result.exception)


def test_shares_replace_those_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Recipe] = []
    monkeypatch.setattr("vtc.eval.tiny.mixture.train_mixture", lambda out, recipe, *a, **k: seen.append(recipe) or out)
    command = ["train", "--model", "tiny-qwen", "--out", str(tmp_path), "--share", "tiny_video=3"]
    result = CliRunner().invoke(app, [*command, "--share", "tiny_list=1"])
    assert result.exit_code == 0, result.output
    assert [(task.name, share) for task, share in mixed(seen[0])] == [("tiny_video", 3.0), ("tiny_list", 1.0)]
    with pytest.raises(InputError, match="leave --share away"):
        CliRunner().invoke(app, ["train", "--out", str(tmp_path), "--share", "tiny_video=1"], catch_exceptions=False)
    with pytest.raises(InputError, match="reads image, images and none of tiny_video"):
        mixed(Recipe("tiny-internvl", shares=(("tiny_video", 1.0),)))
