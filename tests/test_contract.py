"""The contract of vtc.testing over everything that is registered, and proof that the contract can fail."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import vtc
from vtc import adapters
from vtc.app.catalogue import describe_methods
from vtc.engine import eviction
from vtc.engine.engine import Engine
from vtc.errors import UnsupportedMethod
from vtc.method.base import (
    CacheStage,
    Compressor,
    EncoderStage,
    ModelSpec,
    Needs,
    Plan,
    Rows,
    Selection,
    Stage,
    StageView,
)
from vtc.ops.hashing import uniform
from vtc.ops.select import top_k
from vtc.testing import (
    TINY_MODELS,
    Deviation,
    FixedKeep,
    LastRowTopK,
    check_adapter,
    check_method,
    tiny_inputs,
    tiny_model,
)
from vtc.testing.contract import LIMIT, MODES, modes, no_trace
from vtc.testing.everything import limits, runs, small
from vtc.testing.measures import right_padding
from vtc.testing.probes import FixedHeads
from vtc.testing.selections import false_counts

STEPS = 3  # generated tokens: a wrong mask shows at the first, a wrong cache or position at the second

EVERYTHING = os.environ.get("VTC_CONTRACT") == "all"
PROBES = {
    "before and inside the LLM": FixedKeep(at=(0, 1, 3)),
    "data-dependent counts": FixedKeep(at=(0, 2), static=False),
    "inside the LLM and after the prefill": FixedKeep(at=(1, CacheStage(2))),
    "head by head after the prefill": FixedHeads(),
    "attention of the LLM": LastRowTopK(),
    "around single layers": FixedKeep(at=(0, 1, 2, 3), skips=(1, 3)),
    "around single layers, with gains": FixedKeep(at=(0, 1, 2, 3), skips=(1, 3), gains=True),
}


def verify(
    cells: list[Deviation],
    name: str,
    policies: Sequence[str] = ("preserve", "compact"),
    generation: Collection[str] = tuple(MODES),
) -> None:
    """Every cell passed, and every kind of cell was measured."""
    checks = {cell.check.split(": ")[-1] for cell in cells}
    for policy in policies:
        assert {f"oracle, {policy}, {mode}" for mode in set(modes(tiny_model(name))) & set(generation)} <= checks
        assert {f"{what}, {policy}" for what in ("batch = singles", "right = left padding", "two turns")} <= checks
    assert {"text only, bit-identical", "reads no padding", "nothing left behind", "bfloat16 runs"} <= checks
    assert "counts are those of keep" in checks
    assert all(cell.passed and cell.limit <= LIMIT and cell.model == name for cell in cells)


def pairs() -> list[tuple[str, str]]:
    """Every method on every eighth model, other ones for each; with VTC_CONTRACT=all on all of them.

    Methods of few families run, or are refused, on every model.
    """
    models = list(TINY_MODELS)
    found = []
    for at, entry in enumerate(describe_methods(vtc.list_methods())):
        step = 1 if EVERYTHING or len(entry["families"]) < len(adapters.families()) / 2 else 8
        found += [(entry["name"], name) for name in models[at % step :: step]]
    return found


@pytest.mark.parametrize(("method", "name"), pairs())
def test_every_method_keeps_the_contract_on_its_share_of_models(method: str, name: str) -> None:
    """With the position policy it has there, greedy and beams; everything else on every model is the next test's.

    Methods of encoders that run on fewer patches, or of CLIP towers, refuse all other models by their names.
    docs/results/contract.md is drawn from all pairs.
    """
    model, some = tiny_model(name), ("greedy", "beam 3")
    chosen = small(method)
    spec = adapters.of(model).spec
    if not runs(chosen, spec):
        assert spec.packed or not (spec.encoder_stages and spec.clip)
        budget: dict[str, Any] = limits(chosen)
        with pytest.raises(
            UnsupportedMethod,
            match=f"'{method}' .* (inside the vision encoder, which|the vision encoder of) this {spec.family}",
        ):
            vtc.compress(model, chosen, **budget)
        return
    policy = chosen.plan(spec).positions
    cells = check_method(chosen, models=[name], steps=2, **limits(chosen), policies=[policy], generation=some)
    verify(cells, name, [policy], some)
    assert {cell.method for cell in cells} == {method}


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("probe", PROBES)
def test_every_model_serves_every_kind_of_stage(probe: str, name: str) -> None:
    """Every second pair with both position policies and every way to generate, with VTC_CONTRACT=all every one."""
    policies, ways = ["preserve", "compact"], tuple(MODES)
    if (list(PROBES).index(probe) + list(TINY_MODELS).index(name)) % 2 and not EVERYTHING:
        policies, ways = policies[:1], ("greedy",)
    chosen = {"policies": policies, "generation": ways}
    verify(check_method(PROBES[probe], models=[name], steps=STEPS, retention=0.7, **chosen), name, policies, ways)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava-next", "qwen2.5-vl"] if EVERYTHING else ["qwen2.5-vl"])
def test_the_whole_check_of_an_adapter_passes(name: str) -> None:
    """What authors of adapters run; its stages are those of the tests above, which run on every model."""
    cells = check_adapter(name, steps=STEPS)
    verify(cells, name)
    assert {cell.method for cell in cells} == {"fixed_keep", "last_row_top_k"}


@pytest.mark.parametrize(
    "probe",
    [
        FixedKeep(at=(0, 2), rate=0.0),
        FixedKeep(at=(0, 2), rate=0.95),
        FixedKeep(at=(1,), static=False, rate=0.3, seed=3),
        FixedKeep(at=(0, 2, CacheStage(1)), static=False),
        FixedKeep(at=(2, CacheStage(1), CacheStage(3)), static=False),
        FixedKeep(at=(CacheStage(3), CacheStage(0), CacheStage(1))),
        LastRowTopK(layer=1),
        LastRowTopK(layer=3),
    ],
    ids=[
        "nothing left",
        "almost all left",
        "ragged",
        "every kind at once",
        "two caches",
        "three caches",
        "first layer",
        "last layer",
    ],
)
def test_extreme_probes_keep_the_contract(probe: Compressor) -> None:
    verify(check_method(probe, models=["llava-clip"], steps=STEPS, retention=0.85), "llava-clip")


# --- the contract notices what it is there for
@dataclass(frozen=True)
class Neighbourly(Compressor):
    """Wrong on purpose: the draw depends on how many items are in the batch."""

    name: ClassVar[str] = "neighbourly"
    needs_budget: ClassVar[bool] = False

    def select(self, view: StageView) -> Selection:
        draw = uniform(view.fingerprint, view.items.token, len(view.items))
        counts = [count // 2 for count in view.items.counts]
        return Selection(top_k(draw, torch.tensor(counts), view.items.mask), counts=counts)


def failures(method: Compressor, model: str = "llava-clip", retention: float = 0.5) -> str:
    with pytest.raises(AssertionError, match="contract broken") as caught:
        check_method(method, models=[model], steps=2, retention=retention)
    return str(caught.value)


def test_the_contract_notices_a_draw_that_depends_on_the_batch() -> None:
    message = failures(Neighbourly())
    assert "batch = singles, preserve" in message
    assert "oracle" not in message


def test_the_contract_notices_a_changed_text_only_call(monkeypatch: pytest.MonkeyPatch) -> None:
    enter = Engine._enter_llm

    def disturbed(self: Engine, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        enter(self, module, args, kwargs)
        kwargs["inputs_embeds"] = kwargs["inputs_embeds"] * (1 + 1e-6)
        return args, kwargs

    monkeypatch.setattr(Engine, "_enter_llm", disturbed)
    assert "text only, bit-identical" in failures(FixedKeep())


@pytest.mark.parametrize(
    "wrong", [lambda keep: keep.flip(1), lambda keep: keep[:, :1].expand_as(keep)], ids=["other head", "one set"]
)
def test_the_contract_notices_entries_of_another_head(monkeypatch: pytest.MonkeyPatch, wrong: Any) -> None:
    take = eviction._take
    monkeypatch.setattr(eviction, "_take", lambda cache, group, keep, counts: take(cache, group, wrong(keep), counts))
    message = failures(FixedHeads())
    assert "oracle, preserve, greedy" in message
    assert "two turns, preserve" in message


def test_the_contract_notices_what_is_left_behind(clip: Any) -> None:
    def untidy(model: Any) -> vtc.Handle:
        adapters.of(model).layers[1].left_behind = object()
        return vtc.compress(model, FixedKeep())

    assert no_trace(clip, tiny_inputs("llava-clip", [[3, "image", 5]]), untidy) > 0


@dataclass(frozen=True)
class ReadsPadding(vtc.ScoringCompressor):
    """Wrong on purpose: what is taken over axis 1 is taken over the padding of smaller items as well."""

    what: str = "mean"

    name: ClassVar[str] = "reads_padding"

    def score(self, view: StageView) -> torch.Tensor:
        found = getattr(view.tokens, self.what)(1, keepdim=True)
        return (view.tokens - (found if isinstance(found, torch.Tensor) else found.values)).norm(dim=-1)


@pytest.mark.parametrize("what", ["mean", "amax", "amin", "median"])
def test_the_contract_names_methods_that_read_padding(what: str) -> None:
    message = failures(ReadsPadding(what=what), "llava-next")
    assert "image: reads no padding" in message
    check_method(
        ReadsPadding(what=what), models=["llava-clip"], steps=2, generation=["greedy"]
    )  # nothing is padded here


@dataclass(frozen=True)
class ReadsPaddedRows(Compressor):
    """Wrong on purpose: the last attention row is compared with a mean over the padding of smaller items."""

    name: ClassVar[str] = "reads_padded_rows"

    def plan(self, model: Any) -> Plan:
        return Plan((2,), Needs(llm={1: Rows.LAST}), "preserve")

    def select(self, view: StageView) -> Selection:
        score = view.llm_attention(1)
        counts = view.keep_from_layer(2)
        score = (score - score.mean(1, keepdim=True)).abs()
        return Selection(top_k(score, torch.tensor(counts), view.items.mask), counts=counts)


def test_attention_rows_have_padding_too() -> None:
    assert "reads no padding" in failures(ReadsPaddedRows(), "internvl", retention=0.7)


@dataclass(frozen=True)
class Miscounts(Compressor):
    """Wrong on purpose: halves every item and tells the host `off` tokens more than it keeps, of the last item."""

    stage: Stage = 0
    off: int = 0

    name: ClassVar[str] = "miscounts"
    needs_budget: ClassVar[bool] = False

    def plan(self, model: ModelSpec) -> Plan:
        return Plan((self.stage,), Needs(), "preserve")

    def select(self, view: StageView) -> Selection:
        counts = [count // 2 for count in view.items.counts]
        keep = top_k(uniform(view.fingerprint, view.items.token, 0), torch.tensor(counts), view.items.mask)
        return Selection(keep, counts=[*counts[:-1], counts[-1] + self.off])


@pytest.mark.parametrize("off", [-1, 1])
@pytest.mark.parametrize("stage", [0, 2, CacheStage(1), EncoderStage(1), EncoderStage(3)], ids=str)
def test_the_contract_notices_false_counts(stage: Any, off: int) -> None:
    """One too few loses the first text token, which the trace the oracle follows loses as well."""
    message = failures(Miscounts(stage, off))
    assert "image: counts are those of keep: 1.00e+00" in message
    inputs = tiny_inputs("llava-clip", [[4, "image", 3, "image", 5], [2, "image", 12], [9]])
    assert false_counts(tiny_model("llava-clip"), inputs, lambda m: vtc.compress(m, Miscounts(stage))) == 0.0


def test_methods_that_only_evict_lie_as_they_were_padded(clip: Any) -> None:
    """No row leaves the prompt, so the last token of right-padded prompts stays in front of the padding."""
    layout: list[list[Any]] = [[4, "image", 3], [9]]
    attach = lambda m: vtc.compress(m, FixedKeep(at=(CacheStage(1),)))  # noqa: E731
    assert right_padding(clip, "llava-clip", layout, attach) <= LIMIT


def test_the_contract_notices_counts_of_other_items(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(self: Miscounts, view: StageView) -> Selection:
        return Selection(view.items.mask, counts=view.items.counts[:1])

    monkeypatch.setattr(Miscounts, "select", short)
    assert "counts are those of keep: inf" in failures(Miscounts())
