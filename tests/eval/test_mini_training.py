"""The training of mini-llava on a small stand-in: packed questions are prompts, runs can be killed, files merge."""

from __future__ import annotations

import copy
import json
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

import vtc
from vtc.cli.mini import app
from vtc.errors import InputError
from vtc.eval.mini import build, language, validation
from vtc.eval.mini.adapter import LowRank, Projector, merge_file, write_file
from vtc.eval.mini.features import MIX, Features
from vtc.eval.mini.naming import NAMES, Naming
from vtc.eval.mini.settings import Settings
from vtc.eval.mini.text import Writer, with_list
from vtc.eval.mini.train import MiniTrainer, export, square_targets, train
from vtc.eval.tiny.detail import quadrant
from vtc.eval.tiny.lists import MIN_OBJECTS
from vtc.eval.tiny.packing import IGNORED
from vtc.eval.tiny.questions import Question
from vtc.eval.tiny.sample import Facts, Sample, Task
from vtc.eval.tiny.tasks import TASKS

FEW = {"steps_align": 2, "steps_coarse": 1, "steps_joint": 3, "batch_align": 2, "pictures": 8, "first": 8, "added": 0}
SETTINGS = Settings(**FEW)
KILLED = """
import json, os, signal, sys
from pathlib import Path
from vtc.eval.mini import validation
from vtc.eval.mini.settings import Settings
from vtc.eval.mini.train import train

def kill(stage, step):
    if (stage, step) == ("joint", 2):
        os.kill(os.getpid(), signal.SIGKILL)

validation.CHECKED = 4
settings = Settings(**json.loads(sys.argv[3]))
train(Path(sys.argv[1]), Path(sys.argv[2]), settings, device="cpu", threads=1, save_every=1, on_step=kill)
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def byte_tokenizer() -> Any:
    """A tokenizer of single bytes, with the special tokens of SmolLM2."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", language.SPARE]
    vocabulary = {token: place for place, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=special[1], unk_token=special[0])


@pytest.fixture(scope="module")
def made() -> tuple[Any, Any]:
    """A LLaVA of mini-llava's geometry, but small, and its processor."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 1}
    vision = Dinov2Model(Dinov2Config(**sizes, mlp_ratio=1, patch_size=14, image_size=336, use_mask_token=False))
    tokenizer = language.with_image_token(byte_tokenizer())
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    text = LlamaConfig(
        **heads,
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    model = build.assemble(vision, LlamaForCausalLM(text), tokenizer.convert_tokens_to_ids(language.IMAGE))
    for name, weight in model.named_parameters():  # large, so that an error would move the logits
        if weight.ndim >= 2 and "position" not in name:
            weight.data.mul_(8)
    return model, build.processor(tokenizer)


@pytest.fixture(scope="module")
def folder(made: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It as a checkpoint."""
    path = tmp_path_factory.mktemp("mini") / "base"
    build.save(copy.deepcopy(made[0]), made[1], path, None)
    return path


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validate on four pictures."""
    monkeypatch.setattr(validation, "CHECKED", 4)


# --- the checkpoint
def test_the_checkpoint_is_an_ordinary_one(folder: Path, made: tuple[Any, Any]) -> None:
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert prompt == "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    inputs = processor(text=prompt, images=np.zeros((84, 252, 3), np.uint8), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 336, 336)
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == model.config.image_seq_length == 576
    with vtc.compress(model, "vtc_cls", retention=0.25) as handle:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert handle.stats.retention == 0.25
    assert json.loads((folder / build.ORIGIN).read_text())["projector"] == "random"
    weights = load_file(folder / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}


def test_pictures_lie_in_the_middle_of_a_square(made: tuple[Any, Any]) -> None:
    """As the processor pads them, so are the targets: a bright picture on a dark square."""
    wide = torch.full((3, 84, 252), 255, dtype=torch.uint8)
    pixels = made[1].image_processor([wide], return_tensors="pt")["pixel_values"][0, 0]
    bright = (pixels > pixels.max() - 0.1).nonzero()
    assert (int(bright[0, 0]), int(bright[-1, 0])) == pytest.approx((112, 223), abs=2)
    item = TASKS["tiny_image"].make(0, "check").facts.pictures[0][0]
    moved = type(item)("shape", "circle", "red", (0.0, 0.0, 21.0, 21.0))
    targets = square_targets(Facts(((moved,),), (84, 252)))[0].reshape(24, 24)
    assert np.argwhere(targets).tolist() == [[row, column] for row in (8, 9) for column in (0, 1)]


# --- what is trained
def test_low_rank_changes_merge_to_what_they_compute(made: tuple[Any, Any]) -> None:
    model = copy.deepcopy(made[0].model.language_model)
    rows = torch.randn(1, 5, 32)
    changes, merged = LowRank(model), copy.deepcopy(made[0].model.language_model)
    with torch.no_grad():
        before = model(inputs_embeds=rows).last_hidden_state
        changes.attach(model)
        assert torch.equal(model(inputs_embeds=rows).last_hidden_state, before)
        for up in changes.up.values():
            up.normal_()
        changes.merge(merged)
        after = model(inputs_embeds=rows).last_hidden_state
        assert float((after - before).abs().max()) > 1
        assert float((merged(inputs_embeds=rows).last_hidden_state - after).abs().max()) < 1e-4
    model(inputs_embeds=rows).last_hidden_state.sum().backward()
    assert all(parameter.grad is not None for parameter in changes.parameters())


@torch.no_grad()
def test_the_projector_becomes_llavas(made: tuple[Any, Any]) -> None:
    projector, features = Projector(16, 32), 3 + 5 * torch.randn(2, 40, 16)
    projector.standardise(features)
    assert float(((features.flatten(0, 1) - projector.mean) / projector.deviation).std(0).sub(1).abs().max()) < 1e-5
    plain = copy.deepcopy(made[0].model.multi_modal_projector)
    plain.load_state_dict(projector.plain())
    assert float((plain(features) - projector(features)).abs().max()) < 1e-5


@torch.no_grad()
def test_a_file_is_merged(made: tuple[Any, Any], tmp_path: Path) -> None:
    model, file = copy.deepcopy(made[0]), tmp_path / "adapter.safetensors"
    projector, changes = Projector(16, 32), LowRank(model.model.language_model)
    for up in changes.up.values():
        up.data.normal_()
    write_file(file, projector, changes.state_dict(), {"stage": "joint"})
    merge_file(model, file)
    wanted = copy.deepcopy(made[0].model.language_model)
    changes.merge(wanted)
    for name, value in wanted.state_dict().items():
        assert float((model.model.language_model.state_dict()[name] - value).abs().max()) < 1e-2, name
    assert float((model.model.multi_modal_projector.linear_1.weight - projector.linear_1.weight).abs().max()) < 1e-3
    build.save(model, made[1], tmp_path / "trained", file)
    origin = json.loads((tmp_path / "trained" / build.ORIGIN).read_text())
    assert origin["adapter"] == {"file": "adapter.safetensors", "stage": "joint"}
    with pytest.raises(InputError, match=r"holds a trained mini-llava.*write that with vtc mini build --adapter none"):
        MiniTrainer.create(SETTINGS, tmp_path, torch.device("cpu"), tmp_path / "trained")
    save_file({"projector.linear_1.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    for name, match in (("other", r"belongs to another model"), ("missing", r"cannot be read")):
        with pytest.raises(InputError, match=match):
            merge_file(model, tmp_path / f"{name}.safetensors")


def test_rows_are_pulled_towards_names() -> None:
    tokenizer = language.with_image_token(byte_tokenizer())
    table = torch.randn(len(tokenizer), 32, generator=torch.Generator().manual_seed(0))
    naming = Naming(tokenizer, table)
    targets = torch.zeros(1, 5, 3, dtype=torch.uint8)
    targets[0, 0, 1], targets[0, 1, 1] = NAMES[0].index("star"), NAMES[1].index("blue")
    rows = torch.randn(1, 3, 32)

    def mean(name: str) -> Tensor:
        return table[torch.tensor(tokenizer(name)["input_ids"])].mean(0) - table.mean(0)

    rows[0, 1] = 3 * (mean(" star") + mean(" blue"))
    assert float(naming.losses(rows, targets)["pull"]) == pytest.approx(0, abs=1e-6)
    assert float(naming.losses(-rows, targets)["pull"]) == pytest.approx(2, abs=1e-6)
    sized = rows / rows.pow(2).mean(-1, keepdim=True).sqrt() * 2 * table.std()
    assert float(naming.losses(sized, targets)["size"]) == pytest.approx(0, abs=1e-6)
    assert float(naming.losses(sized, 0 * targets)["pull"]) == 0


# --- text
def test_packed_questions_are_the_processors_prompts(folder: Path, made: tuple[Any, Any], tmp_path: Path) -> None:
    """Ids and answers' logits of every slot equal those of a prompt that asks this question alone."""
    model, processor = copy.deepcopy(made[0]).eval(), made[1]
    trainer = MiniTrainer.create(SETTINGS, tmp_path, torch.device("cpu"), folder)
    trainer.model = model
    writer = Writer(processor)
    sample: Sample = TASKS["tiny_image"].make(1, "check")
    text = writer.write(TASKS["tiny_image"], [sample.facts], random.Random(0))
    pixels = processor.image_processor([torch.from_numpy(sample.pictures[0]).permute(2, 0, 1)], return_tensors="pt")
    with torch.no_grad():
        rows = model.model.get_image_features(pixels["pixel_values"], return_dict=True).pooler_output[0][None]
        packed = torch.split(model.lm_head(trainer.hidden(rows, text, SETTINGS.stages[-1]))[0], list(text.lengths))
    families = 0
    slots = zip(packed, *(torch.split(t[0], list(text.lengths)) for t in (text.ids, text.labels)), strict=True)
    for logits, ids, labels in slots:
        answer = labels[labels != IGNORED]
        question = ids[: int((labels != IGNORED).nonzero()[0]) + 1]
        asked = processor.tokenizer.decode(question)
        prompt = torch.tensor([writer.before + [3] * 576 + writer.after + question.tolist()])
        inputs = {"input_ids": prompt, "pixel_values": pixels["pixel_values"]}
        with torch.no_grad():
            alone = model(**inputs).logits[0, -1]
        assert float((alone - logits[len(question) - 1]).abs().max()) < 1e-4 * float(alone.abs().max()), asked
        assert answer[-1] == writer.end and len(answer) > 1
        families += 1
    assert families == len(text.families[0]) == 13
    assert text.families[0][-1] == "list" and len(answer) > 2 * MIN_OBJECTS


@pytest.mark.parametrize("task", MIX, ids=lambda task: task.name)
def test_the_list_names_every_shape_and_its_quarter_where_there_is_no_doubt(task: Task) -> None:
    ask, asked = with_list(task).families["list"], set()
    for number in range(8):
        facts = task.make(number, "train").facts
        shapes = sorted((item for item in facts.pictures[0] if item.kind == "shape"), key=lambda item: item.centre[0])
        plain = [f"{item.colour} {item.name}" for item in shapes]
        placed = [f"{item.colour} {item.name} {quadrant(item, facts.size)}".strip() for item in shapes]
        for seed in range(8):
            question = ask(facts, random.Random(8 * number + seed))
            if question is None:
                assert len(shapes) < MIN_OBJECTS
                continue
            names = placed if question.text.startswith("Where is every object") else plain
            way = 1 if question.text.endswith("left to right.") else -1
            assert question.answer == ", ".join(names[::way])
            asked.add((names is placed, way))
    assert len(asked) == 4
    assert "list" not in with_list(task).graded and with_list(task).graded == task.graded


def test_prompts_begin_as_in_training(made: tuple[Any, Any]) -> None:
    processor, writer = made[1], Writer(made[1])
    content = [{"type": "image"}, {"type": "text", "text": "Where is it?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=prompt, images=np.zeros((9, 9, 3), np.uint8), return_tensors="pt")
    ids, _ = writer.slot(Question("Where is it?", ""))
    assert inputs["input_ids"][0].tolist() == writer.before + [3] * 576 + writer.after + ids


def test_the_coarse_stage_reads_means_of_squares(folder: Path, tmp_path: Path) -> None:
    trainer = MiniTrainer.create(SETTINGS, tmp_path, torch.device("cpu"), folder)
    rows, text = (
        torch.randn(1, 24, 24, 32),
        trainer.writer.write(MIX[0], [MIX[0].make(1, "check").facts], random.Random(0)),
    )
    means = rows.unflatten(2, (12, 2)).unflatten(1, (12, 2)).mean((2, 4)).flatten(1, 2)
    with torch.no_grad():
        coarse = trainer.hidden(rows.flatten(1, 2), text, SETTINGS.stages[1])
        plain = trainer.hidden(means, text, SETTINGS.stages[2])
    assert coarse.shape[1] == text.ids.shape[1] and torch.allclose(coarse, plain, atol=1e-2)


# --- data
def test_features_are_computed_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def encode(pictures: list[Any]) -> Tensor:
        calls.append(len(pictures))
        return torch.stack([torch.full((4, 2), float(picture.mean())) for picture in pictures])

    tmp_path.joinpath("check-00000.1.part").write_bytes(b"torn")
    for _ in range(2):
        features, known = Features(tmp_path, "check", encode).read([3, 0])
    assert calls == [50]
    assert features.dtype == torch.float16 and features.shape == (2, 4, 2)
    expected = MIX[1].make(1, "check")
    assert float(features[0, 0, 0]) == pytest.approx(float(expected.pictures.mean()), rel=1e-3)
    assert known[0] == (MIX[1], expected.facts) and known[1][0] is MIX[0]


def test_pictures_are_added_with_the_steps() -> None:
    settings = Settings(pictures=100, first=10, added=4)
    assert [settings.available(step) for step in (0, 1, 5, 1000)] == [10, 14, 30, 100]
    with pytest.raises(InputError, match="pictures must be at least 1, got 0"):
        Settings(pictures=0)
    with pytest.raises(InputError, match="seed must be at least 0, got -1"):
        Settings(seed=-1)


# --- runs
@pytest.mark.usefixtures("few")
def test_killed_and_resumed_equals_uninterrupted(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, tmp_path / "killed", folder, json.dumps(FEW)]
    killed = subprocess.run(command, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    steps: list[tuple[str, int]] = []

    def run(out: Path) -> dict[str, Tensor]:
        return load_file(
            train(
                out, folder, SETTINGS, device="cpu", threads=1, on_step=lambda stage, step: steps.append((stage, step))
            )
        )

    early = export(tmp_path / "killed", tmp_path / "early.safetensors")
    resumed, resumed_steps = run(tmp_path / "killed"), list(steps)
    shutil.copytree(tmp_path / "killed" / "features", tmp_path / "whole" / "features")
    whole = run(tmp_path / "whole")
    assert resumed_steps == [("joint", 3)] and len(steps) == 7
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert any(not torch.equal(value, whole[name]) for name, value in load_file(early).items())
    log = [json.loads(line) for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in log] == [("align", 2), ("coarse", 1), ("joint", 3)]
    assert {"content", "place", "pull", "size", "answer"} == log[-1]["losses"].keys()
    assert {"patch kind", "image/existence", "detail/large_count"} <= log[-1]["measured"].keys()
    with pytest.raises(InputError, match="other settings"):
        train(tmp_path / "whole", folder, Settings(steps_align=2), device="cpu", threads=1)


def test_stages_update_what_they_should(folder: Path, tmp_path: Path) -> None:
    trainer = MiniTrainer.create(SETTINGS, tmp_path, torch.device("cpu"), folder)
    align, coarse, joint = SETTINGS.stages
    parts = [{name.split(".")[0] for name, _ in trainer.trained(stage)} for stage in (align, coarse, joint)]
    assert parts == [{"projector", "heads"}, *2 * [{"projector", "heads", "low_rank"}]]
    losses = trainer.losses(trainer.batch(1, 0), joint)
    trainer.total(losses, joint).backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None for name, p in trainer.trained(joint) if ".up." in name)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert "answer" not in trainer.losses(trainer.batch(0, 0), align)


def test_commands_refuse_what_is_not_there(tmp_path: Path) -> None:
    runner = CliRunner()
    for words, match in (
        (
            ["train", "--out", str(tmp_path / "run"), "--model", str(tmp_path)],
            "holds no checkpoint; write one with vtc",
        ),
        (["export", str(tmp_path), "--out", str(tmp_path / "a")], "holds no checkpoint of a run"),
    ):
        result = runner.invoke(app, words)
        assert isinstance(result.exception, InputError) and match in str(result.exception)
