"""The programs in examples/ run on an embedded model; the ones in front of them where their packages are installed."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import io
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image, ImageDraw

HERE = Path(__file__).parents[1] / "examples"
QUESTION = "What color is the circle?"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def circle() -> Image.Image:
    picture = Image.new("RGB", (168, 168), (235, 235, 235))
    ImageDraw.Draw(picture).ellipse((30, 30, 110, 110), fill=(220, 30, 30))
    return picture


def test_every_example_is_tested() -> None:
    assert {file.stem for file in HERE.glob("*.py")} == {"folder", "train", "server", "gradio_demo"}


def test_a_folder_of_pictures(
    circle: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.png", "b.jpg", "c.png"):
        circle.save(tmp_path / name)
    for name in ("notes.txt", "d.png"):
        (tmp_path / name).write_text("no picture")
    command = ["folder.py", str(tmp_path), "--prompt", QUESTION, "--batch-size", "2", "--max-new-tokens", "1"]
    monkeypatch.setattr(sys, "argv", command)
    example("folder").main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.pop("file") for line in lines] == ["a.png", "b.jpg", "d.png", "c.png"]
    assert "cannot identify" in lines.pop(2)["error"]
    assert {line["answer"] for line in lines} == {"red"}
    assert {line["retention"] for line in lines} == {0.25}


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
def test_the_trainer_trains_behind_compressed_inputs() -> None:
    losses = example("train").train("tiny-llava", "vtc_cls", 0.5, steps=2)
    assert len(losses) == 2
    assert all(0 <= loss < 20 for loss in losses)


def test_the_server_answers_in_batches(circle: Image.Image) -> None:
    with contextlib.closing(example("server").Answers("tiny-llava", "vtc_cls", 0.25)) as answers:
        asked = [answers.ask(circle, QUESTION) for _ in range(3)]
        assert {future.result(timeout=120).split()[0] for future in asked} == {"red"}
        assert answers.handle.stats.retention == 0.25
        before, broken, behind = (answers.ask(circle, text) for text in (QUESTION, "two <image> tokens", QUESTION))
        assert broken.exception(timeout=120) is not None
        assert {before.result(timeout=120).split()[0], behind.result(timeout=120).split()[0]} == {"red"}
        last = answers.ask(circle, QUESTION)
    assert last.result(timeout=0).split()[0] == "red"


def test_the_service_in_front_of_it(circle: Image.Image) -> None:
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    module = example("server")
    circle.save(stream := io.BytesIO(), format="PNG")
    image = base64.b64encode(stream.getvalue()).decode()
    with contextlib.closing(module.Answers("tiny-llava", "vtc_cls", 0.25)) as answers:
        client = TestClient(module.make_app(answers))
        told = client.post("/answer", json={"question": QUESTION, "image": image}).json()
        assert told["answer"].startswith("red")
        assert client.get("/health").json() == {"calls": 1, "retention": 0.25}
        assert client.post("/answer", json={"question": QUESTION, "image": "no picture"}).status_code == 400


def test_the_demo_answers(circle: Image.Image) -> None:
    demo = example("gradio_demo").Demo("tiny-llava")
    whole, short, kept = demo.answer(circle, QUESTION, "vtc_cls", 0.25)
    assert whole.startswith("red") and short.startswith("red")
    assert kept.startswith("25.0%")
    assert demo.answer(None, QUESTION, "vtc_cls", 0.25)[2] == "choose a picture first"
    assert "cannot be met" in demo.answer(circle, QUESTION, "fastv", 0.1)[2]


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)  # gradio's own
def test_the_page_of_the_demo() -> None:
    pytest.importorskip("gradio")
    assert example("gradio_demo").Demo("tiny-llava").page() is not None
