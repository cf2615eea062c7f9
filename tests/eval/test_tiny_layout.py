"""Packed training sequences are the same calculation as one prompt per question; the processor agrees with both."""

from __future__ import annotations

import random

import pytest
import torch
from PIL import Image

from vtc.eval.tiny import layout
from vtc.eval.tiny.batches import normalise, scene_numbers
from vtc.eval.tiny.checking import chat
from vtc.eval.tiny.model import TRAINING_ATTENTION, ModelShape, answer_logits, build_model, see, sine_positions
from vtc.eval.tiny.packing import IGNORED, pack
from vtc.eval.tiny.processor import build_processor, build_tokenizer
from vtc.eval.tiny.questions import FAMILIES
from vtc.eval.tiny.scenes import make_scene
from vtc.eval.tiny.vocabulary import ASSISTANT, END, IMAGE, PAD, TOKEN, USER, VOCABULARY, encode, words

SMALL = ModelShape(hidden=64, vision_layers=3, text_layers=3, heads=2, vision_inner=96, text_inner=96)


def test_the_tokenizer_cuts_text_as_training_does() -> None:
    tokenizer = build_tokenizer()
    rng = random.Random(0)
    for seed in range(20):
        items = make_scene(seed, "check").items
        for ask in FAMILIES.values():
            question = ask(items, rng)
            if question is not None:
                ids = tokenizer(question.text, add_special_tokens=False)["input_ids"]
                assert ids == encode(question.text)
                assert tokenizer.decode(ids) == " ".join(words(question.text))
    assert tokenizer.convert_tokens_to_ids(list(VOCABULARY)) == list(range(len(VOCABULARY)))


def test_the_chat_template_is_that_of_llava() -> None:
    processor = build_processor()
    assert chat(processor, "Is there a red ring?") == "USER: <image>\nIs there a red ring? ASSISTANT:"
    picture = Image.fromarray(make_scene(0, "check").image)
    ids = processor(text=[chat(processor, "Is there a red ring?")], images=[picture])["input_ids"][0]
    image = [TOKEN[IMAGE]] * layout.VISUAL_TOKENS
    assert list(ids) == [TOKEN["<s>"], TOKEN[USER], *image, *encode("Is there a red ring?"), TOKEN[ASSISTANT]]
    turns = [
        {"role": "user", "content": "a ring?"},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
    ]
    assert processor.apply_chat_template(turns) == "USER: a ring? ASSISTANT: yes </s>"


def test_the_image_processor_gives_the_pixels_of_training() -> None:
    image = make_scene(3, "check").image
    pixels = build_processor().image_processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, normalise(image[None]), atol=1e-5, rtol=0)


def test_packs_are_full_and_label_only_answers() -> None:
    rng = random.Random(1)
    for seed in range(100):
        text = pack(make_scene(seed, "train").items, rng)
        assert len(text.ids) == len(text.labels) == layout.TEXT_TOKENS
        assert len(text.families) == len(layout.SLOTS)
        start = 0
        for _, length in layout.SLOTS:
            ids, labels = text.ids[start : start + length], text.labels[start : start + length]
            at = ids.index(TOKEN[ASSISTANT])
            assert labels[at] == ids[at + 1] and labels[at + 1] == TOKEN[END]
            assert set(labels[:at] + labels[at + 2 :]) <= {IGNORED}
            assert set(ids[at + 2 :]) <= {TOKEN[PAD]}
            start += length


@torch.no_grad()
def test_packed_logits_equal_single_prompts() -> None:
    torch.manual_seed(0)
    packed = build_model(SMALL, TRAINING_ATTENTION).eval()
    single = build_model(SMALL).eval()
    single.load_state_dict(packed.state_dict())
    processor = build_processor()
    scene = make_scene(5, "check")
    text = pack(scene.items, random.Random(0))
    pixels = normalise(scene.image[None])
    mask = layout.additive_mask(torch.float32, torch.device("cpu"))
    patches = see(packed, pixels).patches
    logits = answer_logits(packed, patches, torch.tensor([text.ids]), layout.positions(), mask)[0]
    start = 0
    for _, length in layout.SLOTS:
        ids = [token for token in text.ids[start : start + length] if token != TOKEN[PAD]]
        prompt = chat(processor, " ".join(VOCABULARY[token] for token in ids[:-2]))
        batch = processor(text=[prompt], images=[Image.fromarray(scene.image)], return_tensors="pt")
        expected = single(**batch).logits[0, -1]
        torch.testing.assert_close(logits[start + len(ids) - 2], expected, atol=1e-4, rtol=0)
        start += length


def test_sine_positions_tell_all_patches_apart() -> None:
    code = sine_positions(64, 12)
    assert code.pow(2).mean().sqrt().item() == pytest.approx(1.0, abs=0.05)
    distance = torch.cdist(code, code) + 1e3 * torch.eye(144)
    assert distance.min() > 1


def test_scene_order_is_a_pass_over_all_scenes_and_then_another() -> None:
    first = [scene_numbers(0, start, 4, 12) for start in (0, 4, 8)]
    assert sorted(number for part in first for number in part) == list(range(12))
    assert scene_numbers(0, 12, 12, 12) == list(range(12))
    assert first != [scene_numbers(0, start, 4, 12) for start in (12, 16, 20)]
