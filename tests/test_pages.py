"""What README and the pages under docs tell readers to write can be written: every block of theirs is run.

Python runs, also as a session with its output; commands run with published checkpoints replaced by embedded ones, or,
where they would work for minutes, up to the point where the work would begin; files with a title are there for the
blocks behind them; settings in YAML are read.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import importlib.util
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from PIL import Image, ImageDraw

import vtc
from vtc.cli.main import app
from vtc.embedded import model_path
from vtc.method.registry import METHODS
from vtc.testing import tiny_inputs, tiny_model

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', flags=re.DOTALL | re.MULTILINE)
EXTRAS = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().split("optional-dependencies]")[1], re.M))
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
SHELLS = {"", "sh", "bash", "console"}
ELSEWHERE = {"cat", "ls", "export", "hf", "uv", "."}
"""Programs that are no part of this repository."""
STANDS_FOR = {"llava-hf/llava-1.5-7b-hf": "tiny-llava", "Qwen/Qwen2.5-VL-3B-Instruct": "tiny-onevision"}
LONG = (
    "vtc.eval.sweep.run_sweep", "vtc.eval.bench.run.bench", "vtc.eval.report.write_report", "vtc.eval.compare.compare",
    "vtc.eval.rescoring.rescore", "vtc.eval.ledger_check.check", "vtc.eval.training.trainer.train",
    "vtc.eval.training.calibrations.calibrate_embedded", "vtc.eval.tiny.train.train", "vtc.eval.tiny.checking.accuracy",
    "vtc.eval.tiny.mixture.train_mixture", "vtc.eval.tiny.stream.render_ahead", "vtc.eval.tiny.benchmark.write_rows",
    "vtc.eval.tiny.benchmark.task_rows", "vtc.eval.mini.build.build", "vtc.eval.mini.train.train",
    "vtc.eval.mini.train.export", "vtc.eval.encoders.run.run_encoders",
)  # fmt: skip
"""Where work begins that takes long, or that needs the results of a command before it."""


class Block(NamedTuple):
    """A fenced block: the word and the title behind its fence, and what stands in it."""

    kind: str
    title: str
    text: str


class Begins(Exception):
    """The work of a command begins: all that it was given has been read."""


def blocks(page: str) -> list[Block]:
    return [Block(*found) for found in FENCE.findall((ROOT / page).read_text(encoding="utf-8"))]


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What a reader has: a folder with a picture, a clip and a file of methods, and a model with inputs in Python."""
    picture = Image.new("RGB", (168, 168), (230, 230, 230))
    ImageDraw.Draw(picture).ellipse((50, 50, 110, 110), fill=(220, 30, 30))
    for name in ("photo.jpg", "scene.png"):
        picture.save(tmp_path / name)
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        picture.save(tmp_path / "pictures" / f"{number}.png")
    frames = [Image.new("RGB", (84, 84), (40 * number, 0, 0)) for number in range(3)]
    frames[0].save(tmp_path / "clip.mp4", format="GIF", save_all=True, append_images=frames[1:])
    mine = "import vtc\n\n\n@vtc.register\nclass Mine(vtc.ScoringCompressor):\n    def score(self, view):\n"
    (tmp_path / "mine.py").write_text(f"{mine}        return -view.items.token.float()\n")
    (tmp_path / "sweep.yaml").write_text("tasks: [tiny_image]\nlimit: 4\n")
    (tmp_path / "my_sweep.yaml").write_text("tasks: [tiny_image]\n")
    for name in ("RUN/model", "path/to"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).symlink_to(model_path("tiny-onevision"))
    monkeypatch.chdir(tmp_path)
    known = set(METHODS.names())
    model = tiny_model("llava-clip", layers=8)
    model.generation_config.max_new_tokens = 3
    inputs = tiny_inputs("llava-clip", [[20, "image", 20], [15, "image", 25]], model=model)
    attached: list[vtc.Handle] = []
    original = vtc.Handle.__init__

    def noted(handle: vtc.Handle, engine: Any) -> None:
        original(handle, engine)
        attached.append(handle)

    monkeypatch.setattr(vtc.Handle, "__init__", noted)
    yield {"model": model, "inputs": inputs, "prompt_and_completion": inputs}
    for handle in attached:  # a page that shows how to attach for good leaves nothing to the next tests
        handle.detach()
    for name in set(METHODS.names()) - known:
        METHODS.unregister(name)


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long work ends where it would begin."""

    def begin(*_: Any, **__: Any) -> None:
        raise Begins

    for place in LONG:
        module, _, name = place.rpartition(".")
        monkeypatch.setattr(importlib.import_module(module), name, begin)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_every_block_runs(page: str, reader: dict[str, Any], stopped: None, tmp_path: Path) -> None:
    names = dict(reader)
    for block in blocks(page):
        if block.title:
            path = tmp_path / block.title
            path.parent.mkdir(exist_ok=True)
            path.write_text(block.text)
        elif block.kind == "python":
            run_python(block.text, page, names)
        elif block.kind == "yaml":
            read_settings(yaml.safe_load(block.text))
        elif block.kind in SHELLS:
            for line in commands(block.text):
                run_command(line, block.kind)
        else:
            pytest.fail(f"{page}: nothing is known about blocks of {block.kind}")


def run_python(text: str, page: str, names: dict[str, Any]) -> None:
    names.setdefault("vtc", vtc)
    if ">>>" not in text:
        with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(vtc.testing, "check_method", lambda method: method)  # test_readme.py runs it
            with contextlib.suppress(Begins):
                exec(compile(text, page, "exec"), names)
        return
    test = doctest.DocTestParser().get_doctest(text, names, page, page, 0)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    assert doctest.DocTestRunner(optionflags=flags).run(test, clear_globs=False).failed == 0
    names.update(test.globs)


def commands(text: str) -> list[list[str]]:
    """The commands of a block, each as words; in a session those behind $."""
    lines = text.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    return [words for line in lines if (words := shlex.split(line.split("; vtc")[0], comments=True))]


def run_command(words: list[str], kind: str) -> None:
    program, *rest = words
    if program.endswith("python"):
        assert rest[0] == "-m" and importlib.util.find_spec(rest[1].split(".")[0]) is not None, words
    elif program == "pip":
        asked = re.findall(r"\[([\w,]+)\]", " ".join(rest))
        assert {extra for found in asked for extra in found.split(",")} <= EXTRAS, words
    elif program == "make":
        assert set(rest) <= TARGETS, words
    elif program == "bash":
        assert (ROOT / rest[0]).is_file(), words
    elif "=" in program or program in ELSEWHERE:
        assert kind != "sh" or program == ".", words
    else:
        assert program == "vtc", words
        run_vtc(rest)


def run_vtc(words: list[str]) -> None:
    given = [STANDS_FOR.get(word, word) for word in words]
    try:
        status = app(args=given, standalone_mode=False)
    except Begins:
        return
    assert not status, (words, status)


def read_settings(data: dict[str, Any]) -> None:
    """YAML on a page is a sweep's settings, a part of them, or a data map, whose keys name tasks or data sets."""
    from vtc.eval.data_map import Entry
    from vtc.eval.series import make_series

    if {"methods", "model", "video", "sweeps"} & set(data):
        data.pop("plugins", None)
        data.pop("include_path", None)
        assert make_series(data, source="page")
    else:
        assert all(isinstance(value, str | dict) for value in data.values())
        assert all(set(value) <= set(Entry.__annotations__) for value in data.values() if isinstance(value, dict))


@pytest.mark.parametrize("place", LONG)
def test_what_is_stopped_is_there(place: str) -> None:
    module, _, name = place.rpartition(".")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    assert callable(found)
