"""Attention taps: the rows they give equal eager weights, and the model does not notice them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtc
from vtc import adapters
from vtc.engine import taps
from vtc.engine.taps import AttentionCall, TapSet
from vtc.errors import UnsupportedModel
from vtc.method.base import Compressor, ModelSpec, Needs, Plan, Rows, Selection, StageView
from vtc.ops.attention import attention_received, attention_rows
from vtc.testing import LastRowTopK, tiny_inputs, tiny_model

NAMES = ["llava-clip", "llava-siglip", "llava-dinov2"]
PAIR = [[3, "image", 5], [2, "image", 9]]
EVEN = [[3, "image", 5], [2, "image", 6]]


def modules(model: Any, side: str) -> list[Any]:
    adapter = adapters.of(model)
    return list(adapter.vision_attention if side == "vision" else adapter.llm_attention)


@torch.no_grad()
def eager_weights(name: str, side: str, inputs: dict[str, Tensor]) -> list[Tensor]:
    """[B, H, Q, K] weights that every attention module returns under eager attention, None where it did not run."""
    model = tiny_model(name, attn_implementation="eager")
    seen: dict[Any, Tensor] = {}
    for module in modules(model, side):
        module.register_forward_hook(lambda module, args, output: seen.__setitem__(module, output[1]))
    model(**inputs)
    return [seen[module] for module in modules(model, side)]


@torch.no_grad()
def tapped(name: str, side: str, inputs: dict[str, Tensor], tap: Callable[[AttentionCall], Tensor]) -> list[Tensor]:
    """What `tap` returns for every attention module of a model under SDPA."""
    model = tiny_model(name)
    seen: dict[Any, Tensor] = {}
    entries = [(m, lambda call, m=m: seen.__setitem__(m, tap(call))) for m in modules(model, side)]
    taps_ = TapSet(entries)
    taps_.install()
    try:
        model(**inputs)
    finally:
        taps_.remove()
    return [seen[module] for module in modules(model, side)]


def every_row(call: AttentionCall) -> Tensor:
    batch, _, length, _ = call.query.shape
    rows = torch.arange(length).expand(batch, -1)
    return attention_rows(call.query, call.key, rows, call.scaling, mask=call.mask, causal=call.causal, chunk=7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["vision", "llm"])
@pytest.mark.parametrize("layout", [PAIR, EVEN], ids=["padded", "unpadded"])
def test_rows_equal_eager_weights(name: str, side: str, layout: Any, limits: Any) -> None:
    inputs = tiny_inputs(name, layout, extra=layout is PAIR)
    expected = eager_weights(name, side, inputs)
    found = tapped(name, side, inputs, every_row)
    assert len(found) == len(expected) == 4
    real = inputs["attention_mask"].bool() if side == "llm" else torch.ones(expected[0].shape[::2]).bool()
    for rows, weights in zip(found, expected, strict=True):
        assert rows.dtype == torch.float32
        assert rows.shape == weights.shape[:1] + weights.shape[2:]
        assert float((rows - weights.mean(1))[real].abs().max()) <= limits.attention  # rows of padding are arbitrary
        assert float((rows.sum(-1) - 1).abs().max()) <= limits.attention


@pytest.mark.parametrize("name", NAMES)
def test_received_attention_equals_eager_weights(name: str, limits: Any) -> None:
    inputs = tiny_inputs(name, PAIR)
    expected = eager_weights(name, "vision", inputs)
    found = tapped(
        name, "vision", inputs, lambda c: attention_received(c.query, c.key, c.scaling, mask=c.mask, chunk=5)
    )
    for received, weights in zip(found, expected, strict=True):
        assert float((received - weights.mean((1, 2))).abs().max()) <= limits.attention


def test_attention_is_far_from_uniform() -> None:
    """The comparisons above mean something: rows of these models have clear peaks."""
    for side in ("vision", "llm"):
        weights = eager_weights("llava-clip", side, tiny_inputs("llava-clip", EVEN))
        assert all(float(w[:, :, -1].max()) > 3 / w.shape[-1] for w in weights)


@pytest.mark.parametrize("layout", [PAIR, EVEN], ids=["padded", "unpadded"])
def test_the_last_row_inside_the_engine_equals_eager_weights(limits: Any, layout: Any) -> None:
    """Also where a stage before it has already removed tokens: then the eager model runs on the short prompt."""
    views: list[Any] = []

    class Looks(LastRowTopK):
        def select(self, view: Any) -> Any:
            views.append(view)
            return super().select(view)

    model, inputs = tiny_model("llava-clip"), tiny_inputs("llava-clip", layout)
    with vtc.compress(model, Looks(layer=2), retention=0.7), torch.no_grad():
        model(**inputs)
    weights = eager_weights("llava-clip", "llm", inputs)[1].mean(1)[:, -1]
    visual = inputs["input_ids"] == model.config.image_token_id
    expected = torch.stack([row[where] for row, where in zip(weights, visual, strict=True)])
    assert float((views[0].llm_attention(1) - expected).abs().max()) <= limits.attention
    kept = expected.argsort(dim=1, descending=True, stable=True)
    chosen = views[0].keep_from_layer(2)[0]
    assert torch.equal(views[0].items.token, torch.arange(16).expand(2, -1))
    with vtc.compress(model, LastRowTopK(layer=2), retention=0.7) as handle, torch.no_grad():
        model(**inputs)
    for item, order in zip(handle.trace[0].items, kept, strict=True):
        assert torch.equal(item.kept[2], order[:chosen].sort().values)


@dataclass(frozen=True)
class Twice(Compressor):
    """Reads one layer's attention at two later stages; keeps even tokens at the first."""

    views: list[StageView] = field(default_factory=list, compare=False)

    name: ClassVar[str] = "twice"

    @property
    def needs_budget(self) -> bool:
        return False

    def plan(self, model: ModelSpec) -> Plan:
        return Plan((2, 3), Needs(llm={1: Rows.LAST}), "preserve")

    def select(self, view: StageView) -> Selection:
        self.views.append(view)
        return Selection(view.items.token % 2 == 0)


def test_recorded_rows_follow_the_survivors(clip: Any) -> None:
    """Attention recorded before a stage is still that of the same tokens behind it."""
    method = Twice()
    with vtc.compress(clip, method), torch.no_grad():
        clip(**tiny_inputs("llava-clip", [[4, "image", 3, "image", 5], [2, "image", 12]]))
    first, second = (view.llm_attention(1) for view in method.views)
    assert first.shape == (3, 16)
    assert torch.equal(second, first[:, ::2])


class MaskSpy:
    """Records which mask every scaled_dot_product_attention call gets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[Any] = []
        original = torch.nn.functional.scaled_dot_product_attention

        def spy(*args: Any, **kwargs: Any) -> Tensor:
            mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            self.seen.append((None if mask is None else mask.clone(), kwargs.get("is_causal")))
            return original(*args, **kwargs)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)

    def take(self) -> list[Any]:
        seen, self.seen = self.seen, []
        return seen


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", [PAIR, EVEN], ids=["padded", "unpadded"])
def test_the_model_does_not_notice(name: str, layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, spy = tiny_model(name), tiny_inputs(name, layout), MaskSpy(monkeypatch)
    with torch.no_grad():
        plain = model(**inputs).logits
        masks = spy.take()
        entries = [(m, lambda call: None) for side in ("vision", "llm") for m in modules(model, side)]
        watching = TapSet(entries)
        watching.install()
        logits = model(**inputs).logits
        watching.remove()
    assert torch.equal(logits, plain)
    assert len(masks) >= 4 + 4
    for (mask, causal), (tapped_mask, tapped_causal) in zip(masks, spy.take(), strict=True):
        assert causal == tapped_causal
        assert (mask is None) == (tapped_mask is None)
        assert mask is None or torch.equal(mask, tapped_mask)
    assert all(mask is None for mask, _ in masks) == (layout is EVEN)


def test_nested_users_restore_the_registry_last(clip: Any, siglip: Any) -> None:
    before, local = ALL_ATTENTION_FUNCTIONS["sdpa"], dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    calls = {"clip": 0, "siglip": 0}

    def watch(model: Any, key: str) -> TapSet:
        def count(call: AttentionCall) -> None:
            calls[key] += 1

        return TapSet([(modules(model, "vision")[0], count)])

    first, second, third = watch(clip, "clip"), watch(siglip, "siglip"), watch(clip, "clip")
    run = lambda: [m.model.get_image_features(torch.zeros(1, 3, 28, 28)) for m in (clip, siglip)]  # noqa: E731
    with torch.no_grad():
        first.install()
        wrapper = ALL_ATTENTION_FUNCTIONS["sdpa"]
        assert wrapper is not before
        second.install()
        third.install()
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is wrapper
        run()
        assert calls == {"clip": 2, "siglip": 1}
        first.remove()  # not the order of installation
        run()
        assert calls == {"clip": 3, "siglip": 2}
        third.remove()
        run()
        assert calls == {"clip": 3, "siglip": 3}
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is wrapper
        second.remove()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    assert ALL_ATTENTION_FUNCTIONS._local_mapping == local
    assert (taps._taps, taps._users, taps._saved, taps._wrappers) == ({}, {}, {}, {})


def test_a_function_somebody_registered_is_given_back(clip: Any) -> None:
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    own = lambda *args, **kwargs: original(*args, **kwargs)  # noqa: E731
    ALL_ATTENTION_FUNCTIONS["sdpa"] = own
    try:
        with vtc.compress(clip, "vtc_cls", retention=0.5) as handle, torch.no_grad():
            clip(**tiny_inputs("llava-clip", PAIR))
        assert handle.stats.retention == 0.5
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is original


@pytest.mark.parametrize("left", ["another", "none"])
def test_what_somebody_registers_while_a_model_is_attached_ends_no_reading(clip: Any, siglip: Any, left: str) -> None:
    original, calls = ALL_ATTENTION_FUNCTIONS["sdpa"], list[Any]()
    served = vtc.compress(siglip, LastRowTopK(layer=2), retention=0.7)
    ours = ALL_ATTENTION_FUNCTIONS["sdpa"]
    own = lambda module, *args, **kwargs: (calls.append(module), ours(module, *args, **kwargs))[1]  # noqa: E731
    try:
        if left == "another":
            ALL_ATTENTION_FUNCTIONS["sdpa"] = own
        else:
            del ALL_ATTENTION_FUNCTIONS["sdpa"]
        counts: list[AttentionCall] = []
        with vtc.compress(clip, LastRowTopK(layer=2), retention=0.7) as handle, torch.no_grad():
            taps_ = TapSet([(modules(clip, "llm")[0], counts.append)])
            taps_.install()
            clip(**tiny_inputs("llava-clip", PAIR))
            taps_.remove()
        assert handle.stats.retention == pytest.approx(0.7, abs=0.05)
        assert len(counts) == 1  # not once for each of our two layers
        assert bool(calls) == (left == "another")
        served.detach()
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is (own if left == "another" else original)
    finally:
        ALL_ATTENTION_FUNCTIONS._local_mapping.pop("sdpa", None)
    assert (taps._taps, taps._users, taps._saved, taps._wrappers) == ({}, {}, {}, {})


def test_eager_attention_has_no_seam() -> None:
    model = tiny_model("llava-clip", attn_implementation="eager")
    with pytest.raises(UnsupportedModel, match="CLIPAttention runs eager attention"):
        TapSet([(modules(model, "vision")[0], lambda call: None)])
