"""From conversations to inputs: what templates, processors, loaders and devices refuse is one line."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vtc import embedded
from vtc.app import loading
from vtc.app.answer import answer
from vtc.app.images import open_image
from vtc.app.media import Video
from vtc.app.preparation import Chat, prepare
from vtc.errors import InputError

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))


def ask(text: str, *pictures: Any, source: str = "the prompt") -> Chat:
    media = [{"type": "image", "image": picture} for picture in pictures]
    return Chat([{"role": "user", "content": [*media, {"type": "text", "text": text}]}], source)


@pytest.fixture(scope="module")
def loaded() -> loading.Loaded:
    """The embedded LLaVA."""
    return loading.load("tiny-llava", device="cpu")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of its folder, to be spoilt."""
    return Path(shutil.copytree(embedded.model_path("tiny-llava"), tmp_path / "spoilt"))


def refused(run: Any, *words: str) -> None:
    with pytest.raises(InputError) as error:
        run()
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_any_form_of_a_picture_gives_the_same_inputs(loaded: loading.Loaded, tmp_path: Path) -> None:
    turned = PICTURE.transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(file := tmp_path / "phone.png", exif=exif)
    forms = [PICTURE, file, str(file), open_image(file), file.read_bytes(), Image.open(file)]
    first, *others = [prepare(loaded, [ask("what is this?", form)]).inputs for form in forms]
    assert all(torch.equal(first["pixel_values"], other["pixel_values"]) for other in others)
    assert all(torch.equal(first["input_ids"], other["input_ids"]) for other in others)


def test_the_begin_token_is_written_once(loaded: loading.Loaded) -> None:
    begin = loaded.processor.tokenizer.bos_token_id
    result = prepare(loaded, [ask("what is this?", PICTURE), ask("is there a red star?", PICTURE)]).inputs
    assert (result["input_ids"] == begin).sum(1).tolist() == [1, 1]


@pytest.mark.parametrize("pictures", [(), (PICTURE,)])
def test_a_placeholder_in_the_question_is_refused(loaded: loading.Loaded, pictures: tuple[Any, ...]) -> None:
    refused(
        lambda: prepare(loaded, [ask("hi", *pictures), ask("what is <image>?", *pictures, source="document 7")]),
        "document 7 holds '<image>', which stands for a picture",
    )


def test_the_question_at_fault_is_named_in_a_batch(loaded: loading.Loaded, tmp_path: Path) -> None:
    (broken := tmp_path / "broken.png").write_bytes(b"nothing")
    refused(lambda: prepare(loaded, [ask("hi", PICTURE), ask("hi", PICTURE, broken)]), "broken.png", "cannot be read")
    batch = [ask("hi", PICTURE, source="a"), ask("hi", 7, source="b")]
    refused(lambda: prepare(loaded, batch), "b: a picture cannot be of type int")


def test_a_processor_that_fails_names_picture_question_or_batch(
    loaded: loading.Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fails:
        """The processor, but for what `unwanted` finds fault with."""

        unwanted: Any = None
        image_token = video_token = None

        def __getattr__(self, name: str) -> Any:
            return getattr(loaded.processor, name)

        def __call__(self, **given: Any) -> Any:
            if self.unwanted(given):
                raise RuntimeError("no\n  way")
            return loaded.processor(**given)

        def image_processor(self, images: Any, **_: Any) -> None:
            if images[0].width == 33:
                raise RuntimeError("no\n  way")

    processor: Any = Fails()
    other = dataclasses.replace(loaded, processor=processor)
    batch = [ask("hi", PICTURE, source="a"), ask("ho", PICTURE, PICTURE.resize((33, 20)), source="b")]
    processor.unwanted = lambda given: any(one.width == 33 for row in given["images"] for one in row)
    refused(lambda: prepare(other, batch), "image 2 (33 x 20 pixels) in b", "model 'tiny-llava' (no way)")
    processor.unwanted = lambda given: any("hi" in text for text in given["text"])
    refused(lambda: prepare(other, batch), "a is refused", "(no way)")
    processor.unwanted = lambda given: len(given["text"]) > 1
    refused(lambda: prepare(other, batch), "the batch of a, b is refused", "--batch-size 1")


def test_a_broken_chat_template_is_named(loaded: loading.Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    for template, words in (
        ("{% for m in messages %}{{ m['content'] + 'x' }}{% endfor %}", "cannot write the prompt"),
        ("{% for m in messages %}", "cannot write the prompt"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0]['role'] }}", "writes '<image>' 0 times where the prompt has 1 of kind image"),
    ):
        monkeypatch.setattr(loaded.processor, "chat_template", template)
        refused(lambda: answer(loaded, [PICTURE], "what is this?"), "chat template of model 'tiny-llava'", words)


def test_without_a_template_placeholders_and_text_are_joined(
    loaded: loading.Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded.processor, "chat_template", None)
    assert answer(loaded, [PICTURE, PICTURE], "what is this?", max_new_tokens=2).visual_tokens_in == 288


def test_video_for_a_model_of_pictures_is_refused(loaded: loading.Loaded) -> None:
    clip = Video(np.zeros((2, 8, 8, 3), np.uint8), np.arange(2.0), 1.0, 2)
    refused(lambda: answer(loaded, [], "what is this?", videos=[clip]), "llava models take none")


@pytest.mark.parametrize(
    ("device", "words"),
    [("nonsense", "nonsense"), ("cpu:x", "cpu:x"), ("cuda:99", "cuda:99"), ("meta", "holds no numbers")],
)
def test_a_device_that_cannot_be_used_is_refused_before_anything_is_read(
    device: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("read"))
    refused(lambda: loading.load("tiny-llava", device=device), f"device {device!r} cannot be used here", words, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_where_there_is_none_is_refused() -> None:
    refused(lambda: loading.load("tiny-llava", device="cuda"), "device 'cuda' cannot be used here", "auto, cpu")


def test_a_device_without_room_or_at_fault_is_named(loaded: loading.Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, words in ((torch.OutOfMemoryError, "has not enough memory"), (torch.AcceleratorError, "failed")):

        def fail(*_: Any, error: Any = kind, **__: Any) -> None:
            raise error("CUDA error:\nno more")

        monkeypatch.setattr(loaded.model, "generate", fail)
        refused(lambda: answer(loaded, [PICTURE], "what is this?"), "device 'cpu'", words, "no more")
    monkeypatch.undo()

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    refused(lambda: loading.load("tiny-llava", device="cpu"), "model 'tiny-llava' does not fit on device 'cpu'")


def test_a_checkpoint_without_its_processor_is_refused(checkpoint: Path) -> None:
    for file in checkpoint.glob("*processor*.json"):
        file.unlink()
    refused(lambda: loading.load(str(checkpoint), device="cpu"), str(checkpoint))


def test_damaged_weights_are_refused(checkpoint: Path) -> None:
    (weights,) = checkpoint.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(lambda: loading.load(str(checkpoint), device="cpu"), "cannot load model", str(checkpoint))
