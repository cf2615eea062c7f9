"""CLIP pairs beside a model: what the engine makes of tower rows and questions, what fits, what it costs."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import vtc
from vtc import adapters
from vtc.adapters import pairs
from vtc.app.answer import Answerer
from vtc.app.costs import CostMeter
from vtc.app.loading import load
from vtc.cost.exact import cost
from vtc.engine.pairs import Pair
from vtc.errors import InputError, UnsupportedCall, UnsupportedMethod, VTCError
from vtc.method.base import StageView
from vtc.methods.cdpruner import relevance
from vtc.testing import tiny_inputs, tiny_model
from vtc.testing.pairs import LENGTH, WIDTH, tiny_pair
from vtc.testing.processors import tiny_processor

NAME = "llava-clip"
LAYOUT: list[list[Any]] = [[3, "image", 5, "image", 2], [2, "image", 9], [4]]
ASKED = ["what is red?", "how many rings are there?", "nothing"]


def shown(model: Any, inputs: dict[str, Tensor], method: str = "trim", **given: Any) -> StageView:
    """What a method saw before the LLM."""
    seen: list[StageView] = []
    chosen = vtc.create(method, pair=tiny_pair(NAME), **({"relevance": "clip"} if method == "cdpruner" else {}))
    select = type(chosen).select

    def noting(self: Any, view: StageView) -> Any:
        seen.append(view)
        return select(self, view)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(type(chosen), "select", noting)
        with vtc.compress(model, chosen, retention=0.4, **given):
            model(**inputs)
    return seen[0]


def by_hand(model: Any, inputs: dict[str, Tensor], texts: list[str]) -> tuple[Tensor, Tensor]:
    """Projected rows [images, 16, C] and questions [B, C], by the CLIP's own modules."""
    clip = transformers.CLIPModel.from_pretrained(tiny_pair(NAME)).eval()
    words = transformers.AutoTokenizer.from_pretrained(tiny_pair(NAME))
    tower = model.model.vision_tower
    with torch.no_grad():
        rows = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        projected = clip.visual_projection(clip.vision_model.post_layernorm(rows))
        ids = [words(text, truncation=True, max_length=LENGTH, return_tensors="pt") for text in texts]
        features = [clip.get_text_features(**each) for each in ids]
    return projected, torch.cat([each if isinstance(each, Tensor) else each.pooler_output for each in features])


@pytest.mark.parametrize("method", ["trim", "cdpruner"])
def test_rows_and_questions_are_those_of_the_clip(clip: Any, method: str, limits: Any) -> None:
    inputs = tiny_inputs(NAME, LAYOUT, model=clip)
    view = shown(clip, inputs, method, questions=ASKED)
    projected, texts = by_hand(clip, inputs, ASKED)
    tokens, question = vtc.create("trim", pair=tiny_pair(NAME)).compared(view)  # type: ignore[attr-defined]
    assert tokens.shape == (3, 16, WIDTH)
    assert torch.allclose(tokens, projected, atol=limits.hidden)
    assert torch.allclose(question, texts[[0, 0, 1]], atol=limits.hidden)


def test_the_kept_set_of_cdpruner_follows_the_clip(clip: Any) -> None:
    inputs = tiny_inputs(NAME, LAYOUT, model=clip)
    view = shown(clip, inputs, "cdpruner", questions=ASKED)
    projected, texts = by_hand(clip, inputs, ASKED)
    method = vtc.create("cdpruner", relevance="clip", pair=tiny_pair(NAME))
    expected = relevance(projected, texts[[0, 0, 1]][:, None], view.items.mask)
    assert torch.allclose(method.quality(view), expected, atol=1e-5)  # type: ignore[attr-defined]
    cosines = torch.cosine_similarity(projected, texts[[0, 0, 1]][:, None], dim=-1)
    assert (method.quality(view).argmax(1) == cosines.argmin(1)).all()  # type: ignore[attr-defined]


def test_questions_are_said_or_decoded(clip: Any) -> None:
    """Padding, pictures and the system prompt are no part of it; beams share theirs; what is said comes first."""
    processor = tiny_processor(NAME)
    inputs = tiny_inputs(NAME, LAYOUT, model=clip)
    words = []
    for ids, real in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True):
        kept = [token for token, there in zip(ids, real, strict=True) if there and token != clip.config.image_token_id]
        words.append(processor.tokenizer.decode(kept, skip_special_tokens=True).strip())
    decoded, said = (shown(clip, inputs, **given).pair(tiny_pair(NAME)).texts for given in (
        {"processor": processor}, {"questions": words},
    ))  # fmt: skip
    assert torch.allclose(decoded, said) and not torch.allclose(decoded[0], decoded[1])
    both = shown(clip, inputs, questions="one for all", processor=processor).pair(tiny_pair(NAME)).texts
    assert torch.equal(both[0], both[2])
    cut = shown(clip, inputs, processor=processor, system_length=3).pair(tiny_pair(NAME)).texts
    assert not torch.allclose(cut[0], decoded[0])
    with vtc.compress(clip, "trim", retention=0.4, pair=tiny_pair(NAME)) as handle:
        handle.questions = ASKED
        beams = clip.generate(**inputs, max_new_tokens=3, num_beams=2, do_sample=False)
        handle.questions = ASKED[:1]
        assert handle.questions == ("what is red?",)
    assert beams.shape[0] == 3


def test_a_question_is_encoded_once_in_a_call(clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, encoded = tiny_inputs(NAME, LAYOUT, model=clip), list[list[str]]()
    encode = pairs.Transformers.encode_texts
    monkeypatch.setattr(pairs.Transformers, "encode_texts", lambda s, t: (encoded.append(list(t)), encode(s, t))[1])
    with vtc.compress(clip, "trim", retention=0.4, pair=tiny_pair(NAME), questions=["a", "b", "a"]):
        clip.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert encoded == [["a", "b"]]


# --- what is refused
def test_what_is_refused_says_what_to_write(clip: Any, tmp_path: Path) -> None:
    inputs = tiny_inputs(NAME, LAYOUT, model=clip)
    other = tiny_model(NAME, seed=9)

    def attach(model: Any = clip, **given: Any) -> Any:
        return vtc.compress(model, "trim", retention=0.4, **{"pair": tiny_pair(NAME), **given})

    with pytest.raises(VTCError, match=r"'trim' compares .* and pair does not name it; write its folder"):
        attach(pair=None)
    with pytest.raises(InputError, match=r"cannot load model 'no/where'.*Give tiny-clip"):
        attach(pair="no/where")
    with pytest.raises(
        UnsupportedMethod, match=r"pair='tiny-clip' has a vision tower of 6 layers .* from which it was"
    ):
        attach(pair="tiny-clip")
    with pytest.raises(UnsupportedMethod, match=r"of the sizes of this llava model's with other weights \(cosine"):
        attach(other)
    with pytest.raises(UnsupportedMethod, match=r"'trim' .* the vision encoder of this llava model is no half"):
        attach(tiny_model("llava-siglip"))
    with pytest.raises(InputError, match=r"questions=3 are no texts; pass that of each prompt"):
        attach(questions=3)
    with pytest.raises(
        VTCError, match=r"pair='x' is given, which relevance='llm' does not use; write relevance='clip'"
    ):
        vtc.create("cdpruner", pair="x")
    with torch.no_grad():
        with attach(), pytest.raises(UnsupportedCall, match=r"not known: no questions .* no processor was given; pass"):
            clip(**inputs)
        with (
            attach(questions=["a", "b"]),
            pytest.raises(UnsupportedCall, match="questions has 2 entries for a batch of"),
        ):
            clip(**inputs)
    assert not any("vtc" in key for key in clip.__dict__)


def test_a_siglip_is_no_pair(clip: Any, tmp_path: Path) -> None:
    """It has a text tower, but pools by a head of attention: no row is projected to where texts are."""
    vision = clip.config.vision_config.to_dict() | {"num_hidden_layers": 4}
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 128,
    }
    model = transformers.SiglipModel(
        transformers.SiglipConfig(vision_config={name: vision[name] for name in names}, text_config=text)
    )
    model.vision_model.embeddings.patch_embedding.weight.data.copy_(adapters.of(clip).patch_projection.weight)
    model.save_pretrained(tmp_path)
    for file in Path(tiny_pair(NAME)).glob("*"):
        if not (tmp_path / file.name).exists() and file.suffix == ".json":
            shutil.copy(file, tmp_path)
    with pytest.raises(VTCError, match="does not project single rows"):
        vtc.compress(clip, "trim", retention=0.4, pair=str(tmp_path))


def test_other_files_are_another_pair(clip: Any, tmp_path: Path) -> None:
    """What results and caches depend on: the pair's own files, not its folder's name."""
    copied = shutil.copytree(tiny_pair(NAME), tmp_path / "pair")
    one, two = vtc.create("trim", pair=tiny_pair(NAME)).described(), vtc.create("trim", pair=str(copied)).described()
    assert one["pair_digests"] == two["pair_digests"]
    (copied / "tokenizer_config.json").write_text("{}")
    assert vtc.create("trim", pair=str(copied)).described()["pair_digests"] != two["pair_digests"]
    assert "pair_digests" not in vtc.create("trim", pair="ViT-B-32:openai").described()


# --- cost
def test_the_pair_is_counted(clip: Any) -> None:
    """What torch counts of one question and of the rows that are projected, and every parameter that is held."""
    pair = Pair(tiny_pair(NAME), "trim", adapters.of(clip))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        pair._encoder.encode_texts(["what?"])
        pair._project(torch.randn(16, 32))
    assert counter.get_total_flops() == pair.shape.operations(16)
    whole = transformers.CLIPModel.from_pretrained(tiny_pair(NAME))
    tower = sum(weight.numel() for weight in whole.vision_model.encoder.layers.parameters())
    assert pair.shape.weights == sum(weight.numel() for weight in whole.parameters()) - tower
    inputs = tiny_inputs(NAME, [[3, "image", 5]], model=clip)
    meter = CostMeter(clip)
    with torch.no_grad():
        with vtc.compress(clip, "trim", keep=5, pair=tiny_pair(NAME), questions="what?") as handle:
            clip(**inputs)
        (full,) = meter.untouched(inputs, [16], [8]) or ()
        (work,) = meter.compressed([full], handle, handle.stats.calls[0])
    assert work.method == pair.shape.operations(16) and work.method_weights == pair.shape.weights
    assert meter.shape is not None
    more = cost(meter.shape, work, 2).weight_bytes - cost(meter.shape, full, 2).weight_bytes
    assert more == 2 * pair.shape.weights


# --- open_clip, and everything together
def kept(pair: str, length: int) -> int | None:
    """Tokens kept of a picture of 144 by an answer with that pair, whose texts have `length` tokens."""
    answerer = Answerer(load("tiny-llava", device="cpu"))
    part = {"type": "image", "image": Image.new("RGB", (168, 168), "red")}
    batch = answerer.prepare([[{"role": "user", "content": [part, {"type": "text", "text": "What color is it?"}]}]])
    assert batch.questions == ("What color is it?",)
    with answerer.compressed("trim", retention=0.25, pair=pair) as handle:
        (reply,) = answerer.generate(batch, {"max_new_tokens": 2, "do_sample": False}, handle)
        assert handle.questions == batch.questions
        assert handle.pairs[0].length == length
    return reply.visual_tokens_kept


def test_the_embedded_pair_answers() -> None:
    """tiny-clip is open_clip's; its first blocks are tiny-llava's tower. A sweep says the question by itself."""
    assert kept("tiny-clip", length=48) == 36


def with_a_tower_of_transformers(folder: Path) -> Path:
    """The embedded CLIP in `folder` with a random RoBERTa for its texts."""
    open_clip: Any = importlib.import_module("open_clip")  # an extra
    shutil.copytree(vtc.embedded.model_path("tiny-clip"), folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    text = {"hf_model_name": str(folder / "text"), "context_length": 16}
    text |= {"hf_pooler_type": "mean_pooler", "hf_proj_type": "linear", "hf_tokenizer_name": str(folder)}
    config["model_cfg"] |= {"text_cfg": text, "custom_text": True}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    words = transformers.AutoTokenizer.from_pretrained(folder)
    roberta = transformers.RobertaConfig(
        **sizes, vocab_size=len(words), max_position_embeddings=40, pad_token_id=words.pad_token_id
    )
    transformers.RobertaModel(roberta, add_pooling_layer=False).save_pretrained(folder / "text")
    weights, own = folder / "open_clip_model.safetensors", Path(vtc.embedded.model_path("tiny-clip"))
    torch.manual_seed(5)
    made = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    made.load_state_dict(load_file(own / weights.name), strict=False)
    save_file({name: tensor.contiguous() for name, tensor in made.state_dict().items()}, weights)
    return folder


def test_the_text_tower_may_be_one_of_transformers(tmp_path: Path) -> None:
    """open_clip's models with a RoBERTa: their layers are found, texts are as long as the tokenizer makes them."""
    folder = with_a_tower_of_transformers(tmp_path / "pair")
    model = load("tiny-llava", device="cpu").model
    pair = Pair(str(folder), "trim", adapters.of(model))
    assert (pair.shape.layers, pair.shape.hidden, pair.shape.length) == (3, 32, 16)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        pair._encoder.encode_texts(["what?"])
        pair._project(torch.randn(16, 128))
    assert counter.get_total_flops() == pair.shape.operations(16)
    assert kept(str(folder), length=16) == 36
