"""Stages inside the vision encoder, against a tower run by hand on the shorter sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import vtc
from vtc import adapters
from vtc.errors import UnsupportedMethod
from vtc.method.base import Compressor, EncoderStage, ModelSpec, Needs, Plan, Rows, Selection, Stage, StageView
from vtc.method.readings import VisionReading
from vtc.ops.select import top_k
from vtc.testing import Oracle, tiny_inputs, tiny_model
from vtc.testing.contract import generate, identical

LAYOUT = [[4, "image", 3, "image", 5], [2, "image", 12], [9]]
TOKENS = 16
TOWERS = {
    "llava-clip": (1, 2),
    "llava-siglip": (0, 3),
    "llava-dinov2": (1, 2),
}  # rows in front of the patches, last layer that counts


@dataclass(frozen=True)
class Inside(Compressor):
    """Keeps the half with the largest norm at every stage; `merge` averages neighbours inside the encoder instead."""

    at: tuple[Stage, ...] = (EncoderStage(1),)
    merge: bool = False
    needs: Needs = field(default_factory=Needs)
    views: list[StageView] = field(default_factory=list, compare=False)

    name: ClassVar[str] = "inside"

    @property
    def needs_budget(self) -> bool:
        return False

    def plan(self, model: ModelSpec) -> Plan:
        return Plan(self.at, self.needs, "compact")

    def select(self, view: StageView) -> Selection:
        self.views.append(view)
        count = view.items.counts[0] // 2
        counts = [count] * len(view.items)
        tokens = view.tokens
        if self.merge and isinstance(view.stage, EncoderStage):
            pairs = tokens.unflatten(1, (-1, 2)).mean(2)
            keep = (torch.arange(2 * count) % 2 == 0).expand(len(view.items), -1)
            return Selection(keep, counts=counts, tokens=pairs.repeat_interleave(2, 1))
        return Selection(top_k(tokens.norm(dim=-1), torch.tensor(counts), view.items.mask), counts=counts)


@dataclass
class ByHand:
    """A tower run layer by layer: raster places of the patches left, projected rows, attention of every layer."""

    places: Tensor
    rows: Tensor
    attention: list[Tensor]


@torch.no_grad()
def by_hand(name: str, pixels: Tensor, stages: dict[int, Callable[[Tensor], tuple[Tensor, Tensor]]]) -> ByHand:
    """stages: layer -> function of [crops, N, C] patches that returns kept places [crops, k] and rows [crops, k, C]."""
    model = tiny_model(name, attn_implementation="eager")
    prefix, last = TOWERS[name]
    tower = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)
    weights: list[Tensor] = []
    hidden = tower.embeddings(pixels)
    if name == "llava-clip":
        hidden = tower.pre_layrnorm(hidden)
    places = torch.arange(hidden.shape[1] - prefix).expand(len(pixels), -1)
    layers = tower.encoder.layer if name == "llava-dinov2" else tower.encoder.layers
    attention = adapters.of(model).vision_attention
    for index, layer in enumerate(layers[: last + 1]):
        if index in stages:
            kept, rows = stages[index](hidden[:, prefix:])
            hidden, places = torch.cat([hidden[:, :prefix], rows], dim=1), places.gather(1, kept)
        hook = attention[index].register_forward_hook(lambda module, args, output: weights.append(output[1]))
        output = layer(hidden, attention_mask=None)
        hidden = output[0] if isinstance(output, tuple) else output
        hook.remove()
    if last + 1 in stages:
        places, rows = stages[last + 1](hidden[:, prefix:])
        hidden = torch.cat([hidden[:, :prefix], rows], dim=1)
    return ByHand(places, model.model.multi_modal_projector(hidden[:, prefix:]), [w.mean(1) for w in weights])


def largest_half(patches: Tensor) -> tuple[Tensor, Tensor]:
    best = patches.norm(dim=-1).argsort(dim=1, descending=True)[:, : patches.shape[1] // 2].sort(1).values
    return best, torch.stack([crop[index] for crop, index in zip(patches, best, strict=True)])


def neighbours(patches: Tensor) -> tuple[Tensor, Tensor]:
    even = torch.arange(0, patches.shape[1], 2).expand(len(patches), -1)
    return even, (patches[:, 0::2] + patches[:, 1::2]) / 2


def first_rows(model: Any, manager: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Rows entering the first LLM layer, and the last token's logits."""
    seen: list[Tensor] = []
    hook = (
        adapters.of(model)
        .layers[0]
        .register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    )
    with manager, torch.no_grad():
        logits = model(**inputs).logits[:, -1]
    hook.remove()
    return seen[0], logits


@torch.no_grad()
def shortened(model: Any, inputs: dict[str, Tensor], rows: Tensor) -> list[Tensor]:
    """Embeddings of every prompt with the `rows` [items, k, D] in place of its placeholders."""
    table, image = model.get_input_embeddings(), model.config.image_token_id
    queue, prompts = list(rows), []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        pieces: list[Tensor] = []
        for place, token in enumerate(ids):
            if not mask[place]:
                continue
            if token != image:
                pieces.append(table(token)[None])
            elif place == 0 or ids[place - 1] != image:
                pieces.append(queue.pop(0))
        prompts.append(torch.cat(pieces))
    assert not queue
    return prompts


@pytest.mark.parametrize("name", TOWERS)
def test_the_tower_by_hand_is_the_tower(name: str, limits: Any) -> None:
    model, pixels = tiny_model(name), tiny_inputs(name, LAYOUT)["pixel_values"]
    with torch.no_grad():
        features = torch.stack(list(model.model.get_image_features(pixels, return_dict=True).pooler_output))
    hand = by_hand(name, pixels, {})
    assert hand.rows.shape == (3, TOKENS, features.shape[-1])
    assert float((hand.rows - features).abs().max()) <= limits.hidden


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize(
    ("method", "stages"),
    [
        (Inside((EncoderStage(1),)), {1: largest_half}),
        (Inside((EncoderStage(2),)), {2: largest_half}),
        (Inside((EncoderStage(1), EncoderStage(2))), {1: largest_half, 2: largest_half}),
        (Inside((EncoderStage(0), EncoderStage(2))), {0: largest_half, 2: largest_half}),
        (Inside((EncoderStage(2),), merge=True), {2: neighbours}),
        (Inside((EncoderStage(1), EncoderStage(2)), merge=True), {1: neighbours, 2: neighbours}),
    ],
    ids=["drop before 1", "drop before 2", "drop twice", "drop before the first", "merge", "merge twice"],
)
def test_survivors_are_those_of_a_shorter_tower(name: str, method: Inside, stages: Any, limits: Any) -> None:
    model, inputs = tiny_model(name), tiny_inputs(name, LAYOUT, extra=1)
    hand = by_hand(name, inputs["pixel_values"], stages)
    lengths: list[int] = []
    handle = vtc.compress(model, method)
    for layer in adapters.of(model).vision_layers:
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: lengths.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
            with_kwargs=True,
        )
    rows, logits = first_rows(model, handle, inputs)

    prefix, last = TOWERS[name]
    expected, count = [], TOKENS
    for layer in range(len(lengths)):
        count //= 2 if layer in stages else 1
        expected.append(prefix + count)
    assert lengths == expected
    assert len(lengths) > last

    for item, places in zip(handle.trace[0].items, hand.places, strict=True):
        assert torch.equal(item.kept[0], places)
    prompts = shortened(model, inputs, hand.rows)
    for prompt, got, answer in zip(prompts, rows, logits, strict=True):
        assert float((got[-len(prompt) :] - prompt).abs().max()) <= limits.hidden
        with torch.no_grad():
            native = model(inputs_embeds=prompt[None]).logits[0, -1]
        assert float((answer - native).abs().max()) <= limits.logits
    assert handle.stats.calls[0].visual_tokens_in == (32, 16, 0)
    assert handle.stats.calls[0].visual_tokens_kept == (2.0 * count, 1.0 * count, 0.0)


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("positions", ["preserve", "compact"])
@pytest.mark.parametrize(
    "stages", [(EncoderStage(1),), (EncoderStage(1), 0), (EncoderStage(2), 2), (EncoderStage(1), 0, 2)]
)
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_stages_combine(name: str, positions: Any, stages: Any, mode: Any, limits: Any) -> None:
    # Before transformers 5.20 generate() hands several images of one prompt to the wrong beams.
    model, inputs = tiny_model(name), tiny_inputs(name, LAYOUT if not mode else LAYOUT[1:], extra=1)
    handle = vtc.compress(model, Inside(stages), positions=positions)
    rows, _ = first_rows(model, nullcontext(), inputs)
    record = handle.trace[0]
    inner = [stage for stage in stages if isinstance(stage, int)]
    left = [TOKENS // 2 ** (1 + inner.index(stage) + 1) for stage in inner] or [TOKENS // 2]
    for item in record.items:
        assert [len(item.kept[stage]) for stage in inner or [0]] == left
    embeddings = torch.zeros(*record.keep[0].shape, rows.shape[-1])
    for prompt, keep, row in zip(embeddings, record.keep[0], rows, strict=True):
        prompt[keep] = row[len(row) - int(keep.sum()) :]
    logits = generate(model, inputs, handle, 4, **mode)[1]
    tables = {stage: keep for stage, keep in record.keep.items() if isinstance(stage, int)}
    oracle = Oracle(model, tables, positions=positions, embeddings=embeddings)
    assert float((logits - generate(model, inputs, oracle, 4, **mode)[1]).abs().max()) <= limits.logits


@pytest.mark.parametrize("name", TOWERS)
def test_attention_of_later_layers_is_spread_back(name: str, limits: Any) -> None:
    """Rows recorded before the stage cover every patch, later ones the survivors, each at its own place."""
    prefix, last = TOWERS[name]
    needed = Rows.CLS if prefix else Rows.RECEIVED
    method = Inside((EncoderStage(2), 0), needs=Needs(dict.fromkeys(range(last + 1), needed)))
    inputs = tiny_inputs(name, LAYOUT)
    hand = by_hand(name, inputs["pixel_values"], {2: largest_half})
    model = tiny_model(name)
    with vtc.compress(model, method), torch.no_grad():
        model(**inputs)
    view = method.views[-1]
    assert view.stage == 0
    assert torch.equal(view.items.token, hand.places)
    for layer in range(last + 1):
        weights = hand.attention[layer]
        rows = (weights[:, 0] if prefix else weights.mean(1))[:, prefix:]
        expected = rows.gather(1, hand.places) if layer < 2 else rows
        got = view.vision_attention(layer)
        assert got.shape == (3, TOKENS // 2)
        assert float((got - expected).abs().max()) <= limits.attention


def test_the_view_inside_the_encoder(clip: Any) -> None:
    method = Inside((EncoderStage(1), EncoderStage(2)))
    inputs = tiny_inputs("llava-clip", LAYOUT)
    with vtc.compress(clip, method), torch.no_grad():
        clip(**inputs)
    first, second = method.views
    assert (first.stage, second.stage) == (EncoderStage(1), EncoderStage(2))
    assert first.hidden.shape == (3, 17, 32)
    assert second.hidden.shape == (3, 9, 32)
    assert first.visual.sum(1).tolist() == [16, 16, 16]
    assert not first.visual[:, 0].any()
    assert first.items.counts == (16, 16, 16)
    assert second.items.counts == (8, 8, 8)
    assert second.items.input_counts == (16, 16, 16)
    assert torch.equal(first.tokens, first.hidden[:, 1:])
    assert first.items.layouts[0].grid == (1, 4, 4)
    assert torch.equal(second.items.token, largest_half(first.tokens)[0])


# --- budgets and refusals
@dataclass(frozen=True)
class Budgeted(Compressor):
    """Keeps the first patches of every crop, as many as the budget grants."""

    layer: int = 1

    name: ClassVar[str] = "budgeted"

    def plan(self, model: ModelSpec) -> Plan:
        return Plan((EncoderStage(self.layer),), Needs(), "compact")

    def select(self, view: StageView) -> Selection:
        keep = torch.tensor(view.keep)
        return Selection(top_k(-view.items.token.float(), keep, view.items.mask), counts=view.keep)


@pytest.mark.parametrize("name", TOWERS)
def test_a_budget_of_everything_changes_no_bit(name: str) -> None:
    model, inputs = tiny_model(name), tiny_inputs(name, LAYOUT, extra=1)
    for budget in ({"retention": 1.0}, {"keep": 16}, {"keep": 99}):
        assert identical(model, inputs, lambda m, b=budget: vtc.compress(m, Budgeted(), **b)) == 0.0


def test_the_budget_counts_llm_tokens(clip: Any) -> None:
    with vtc.compress(clip, Budgeted(), keep=5) as handle, torch.no_grad():
        clip(**tiny_inputs("llava-clip", LAYOUT))
    assert handle.stats.calls[0].visual_tokens_kept == (10.0, 5.0, 0.0)
    assert handle.trace[0].items[0].kept[0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("name", "layers"), [("llava-clip", (4, 9, -1)), ("llava-siglip", (5,))])
def test_layers_without_an_effect_are_refused(name: str, layers: tuple[int, ...]) -> None:
    last = TOWERS[name][1]
    model = tiny_model(name)
    for layer in layers:
        match = rf"before layer {layer} was asked for; the features .* leave layer {last}, so only stages 0 to that"
        with pytest.raises(UnsupportedMethod, match=match):
            vtc.compress(model, Inside((EncoderStage(layer),)))
    with vtc.compress(model, Inside((EncoderStage(last),))):
        pass


@dataclass(frozen=True)
class Unequal(Inside):
    """Keeps the patches of more than the crop's mean norm, and records what later layers attend to."""

    rows: VisionReading = Rows.RECEIVED

    def plan(self, model: ModelSpec) -> Plan:
        return Plan((*self.at, 2), Needs(vision={2: self.rows}), "compact")

    def select(self, view: StageView) -> Selection | None:
        if view.stage == 2:
            view.memory["rows"] = view.vision_attention(2)
            seen.append(view)
            return None
        norms = view.tokens.norm(dim=-1).masked_fill(~view.items.mask, 0)
        mean = norms.sum(1, keepdim=True) / view.items.mask.sum(1, keepdim=True)
        return Selection(norms > mean)


seen: list[StageView] = []


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("name", "rows", "stages"),
    [
        ("llava-clip", Rows.CLS, (1,)),
        ("llava-clip", Rows.RECEIVED, (1, 2)),
        ("llava-clip", Rows.RECEIVED, (1, 3)),
        ("llava-siglip", Rows.RECEIVED, (2,)),
        ("llava-dinov2", Rows.CLS, (1,)),
    ],
)
def test_crops_may_keep_different_numbers(name: str, rows: Any, stages: Any, attention: str, limits: Any) -> None:
    """Each crop comes out as it does alone: padding is masked inside the encoder."""
    method = Unequal(tuple(EncoderStage(layer) for layer in stages), rows=rows)
    if attention == "eager":
        method = dataclasses.replace(method, rows=Rows.HIDDEN)  # attention cannot be read beside eager attention
    layout: list[list[Any]] = [[3, "image", 5], [2, "image", 9], [4, "image", 4]]
    model = tiny_model(name, attn_implementation=attention)
    seen.clear()
    together, logits = first_rows(model, vtc.compress(model, method), tiny_inputs(name, layout, seed=3))
    view = seen.pop()
    counts = view.items.counts
    assert len(set(counts)) > 1
    for index in range(3):
        alone, single = first_rows(model, vtc.compress(model, method), tiny_inputs(name, layout, seed=3, only=index))
        assert float((together[index, -alone.shape[1] :] - alone[0]).abs().max()) <= limits.hidden
        assert float((logits[index] - single[0]).abs().max()) <= limits.logits
        own = seen.pop()
        assert own.items.counts == (counts[index],)
        assert torch.equal(own.items.token[0], view.items.token[index, : counts[index]])
        difference = own.memory["rows"][0] - view.memory["rows"][index, : counts[index]]
        assert float(difference.abs().max()) <= (limits.hidden if attention == "eager" else limits.attention)


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("merge", [False, True])
def test_before_the_projector(name: str, merge: bool, limits: Any) -> None:
    """The stage behind the feature layer changes what the projector reads, no encoder layer."""
    behind = TOWERS[name][1] + 1
    inputs, model = tiny_inputs(name, LAYOUT, seed=1), tiny_model(name)
    hand = by_hand(name, inputs["pixel_values"], {behind: neighbours if merge else largest_half})
    method = Inside((EncoderStage(behind),), merge, Needs(vision={behind - 1: Rows.HIDDEN}))
    found, _ = first_rows(model, vtc.compress(model, method), inputs)
    for row, prompt in zip(found, shortened(model, inputs, hand.rows), strict=True):
        assert float((row[len(row) - len(prompt) :] - prompt).abs().max()) <= limits.logits  # behind the whole tower
    (view,) = method.views
    assert view.items.counts == (TOKENS,) * 3
    assert torch.equal(view.vision_attention(behind - 1), view.tokens)


def test_a_budget_of_everything_is_noted(clip: Any) -> None:
    with vtc.compress(clip, Budgeted(), retention=1.0) as handle, torch.no_grad():
        clip(**tiny_inputs("llava-clip", LAYOUT))
    assert handle.stats.retention == 1.0
    assert [item.kept[0].tolist() for item in handle.trace[0].items] == [list(range(TOKENS))] * 3


@dataclass(frozen=True)
class Declines(Inside):
    """Has stages everywhere and keeps everything at each."""

    def select(self, view: StageView) -> Selection | None:  # type: ignore[override]
        return None


def test_stages_that_keep_everything_are_noted(clip: Any, limits: Any) -> None:
    inputs = tiny_inputs("llava-clip", LAYOUT)
    with torch.no_grad():
        plain = clip(**inputs, use_cache=True).logits[:, -1]
        with vtc.compress(clip, Declines((EncoderStage(1), 2, vtc.AFTER_PREFILL))) as handle:
            logits = clip(**inputs, use_cache=True).logits[:, -1]
    assert float((logits - plain).abs().max()) <= limits.logits
    assert list(handle.trace[0].keep) == [0, 2, vtc.AFTER_PREFILL]
    for item in handle.trace[0].items:
        assert all(kept.tolist() == list(range(TOKENS)) for kept in item.kept.values())
