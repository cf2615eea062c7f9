"""Several methods on one model: every part sees its own budget, needs and memory; the whole keeps the contract."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch

import vtc
from vtc.errors import UnsupportedMethod, VTCError
from vtc.method.base import AFTER_PREFILL, CacheStage, Compressor, EncoderStage, ModelSpec, Needs, Plan, Rows, StageView
from vtc.method.composite import Composite
from vtc.testing import FixedKeep, LastRowTopK, tiny_inputs, tiny_model
from vtc.testing.contract import against_oracle, batch_against_singles, check_method, identical

LAYOUT: list[list[Any]] = [[4, "image", 3, "image", 5], [2, "image", 12], [9]]


@dataclass(frozen=True)
class Looks(Compressor):
    """Keeps everything and notes what it sees."""

    at: tuple[Any, ...] = (0,)
    budgeted: bool = True
    needs: Needs = field(default_factory=Needs)
    views: list[StageView] = field(default_factory=list, compare=False)

    name: ClassVar[str] = "looks"

    @property
    def needs_budget(self) -> bool:
        return self.budgeted

    def keeps_all(self, budget: Any, tokens: int) -> bool:
        return False

    def plan(self, model: ModelSpec) -> Plan:
        return Plan(self.at, self.needs, "compact")

    def select(self, view: StageView) -> None:
        view.memory.setdefault("stages", []).append(view.stage)
        self.views.append(view)


PARTS = [vtc.create("vtc_cls"), LastRowTopK(layer=2), FixedKeep(at=(3, CacheStage(1)))]


@pytest.mark.parametrize("name", ["llava-clip", "llava-next", "qwen2.5-vl"])
@pytest.mark.parametrize("positions", ["preserve", "compact"])
def test_three_methods_keep_the_contract(name: str, positions: Any, limits: Any) -> None:
    model = tiny_model(name)
    attach = lambda m: vtc.compress(m, PARTS, retention=[0.6, 0.8, None], positions=positions)  # noqa: E731
    inputs = tiny_inputs(name, LAYOUT, seed=3, extra=1, model=model)
    assert against_oracle(model, inputs, attach, 4) <= limits.logits
    assert batch_against_singles(model, name, LAYOUT, attach, 4) <= limits.logits


@pytest.mark.parametrize("name", ["llava-clip", "llava-next", "qwen2.5-vl", "internvl"])
def test_published_methods_combine(name: str, limits: Any) -> None:
    """HiPrune before the LLM, AIM's schedule inside it, and MustDrop's cache behind the prefill."""
    model = tiny_model(name, layers=8)
    cache = vtc.create("mustdrop", merge="off", filter="off")
    methods = ["hiprune", vtc.create("aim", merge=False), cache]
    attach = lambda m: vtc.compress(m, methods, retention=[0.7, 0.6, None])  # noqa: E731
    inputs = tiny_inputs(name, LAYOUT, seed=3, extra=1, model=model)
    assert against_oracle(model, inputs, attach, 4) <= limits.logits
    assert batch_against_singles(model, name, LAYOUT, attach, 4) <= limits.logits
    with attach(model) as handle, torch.no_grad():
        cached = model(**inputs, use_cache=True).past_key_values
    assert handle.budget == vtc.Budget(retention=0.7 * 0.6)
    call = handle.stats.calls[0]
    for tokens, kept in zip(call.visual_tokens_in, call.visual_tokens_kept, strict=True):
        assert abs(kept - 0.42 * tokens) <= 2  # each part may be off by one token of each of two images
    lengths = [layer.get_seq_length() for layer in cached.layers]
    (stage,) = [stage for stage in handle.plan.stages if isinstance(stage, CacheStage)]
    assert len(set(lengths[stage.from_layer :])) == 1  # what the last layer saw, but for the layers in front
    assert lengths[0] > lengths[-1]


def test_a_part_may_act_on_the_caches_of_several_layers(clip: Any) -> None:
    """Each stage shows it the tokens that reached it; another part may not act on the cache then."""
    parts = [FixedKeep(at=(CacheStage(2), CacheStage(0))), "random"]
    with vtc.compress(clip, parts, retention=[None, 0.5]) as handle, torch.no_grad():
        clip(**tiny_inputs("llava-clip", [[4, "image", 5]]))
    assert handle.plan.stages == (0, CacheStage(0), CacheStage(2))
    assert handle.stats.calls[0].left == ((2, (4,)), (2, (4,)))
    with pytest.raises(UnsupportedMethod, match="both act at CacheStage"):
        vtc.compress(clip, [parts[0], FixedKeep(at=(CacheStage(3),), seed=1)])


def test_the_whole_contract_of_a_pair() -> None:
    budgets = (vtc.Budget(retention=0.5), None)
    cells = check_method(
        Composite((vtc.create("vtc_cls"), FixedKeep(at=(2,))), budgets), models=["llava-clip"], steps=3
    )
    assert cells


def test_budgets_apply_to_what_reaches_a_part(clip: Any) -> None:
    """The first to act gets a share of the input, the next one a share of what is left."""
    inputs = tiny_inputs("llava-clip", [[4, "image", 5], [3, "image", 6]], seed=1)
    with vtc.compress(clip, ["random", LastRowTopK(layer=2)], retention=[0.5, 0.75]) as handle, torch.no_grad():
        clip(**inputs)
    # 16 tokens, 8 before the LLM; a mean of 6 of 8 over 4 layers leaves 4 behind the second one
    assert [stage.visual_tokens_out for stage in handle.stats.calls[0].stages] == [16, 8]
    assert handle.stats.calls[0].visual_tokens_kept == (6.0, 6.0)
    assert handle.stats.retention == pytest.approx(0.375)
    assert handle.budget == vtc.Budget(retention=0.375)


def test_every_part_sees_its_own_view(clip: Any) -> None:
    inner = Looks((1, 3), needs=Needs(llm={0: Rows.LAST}))
    first = Looks((0,), needs=Needs(vision={1: (Rows.CLS, Rows.RECEIVED)}))
    cache = Looks((AFTER_PREFILL,), budgeted=False)
    encoder = Looks((EncoderStage(1),), needs=Needs(vision={2: Rows.CLS}))
    methods = [inner, cache, first, encoder]
    with vtc.compress(clip, methods, keep=[4, None, 5, 6]) as handle, torch.no_grad():
        clip(**tiny_inputs("llava-clip", [[4, "image", 5]]))
    assert handle.plan.stages == (EncoderStage(1), 0, 1, 3, AFTER_PREFILL)
    assert handle.plan.positions == "compact"
    assert [view.stage for view in inner.views] == [1, 3]
    budgets = [looks.views[-1].budget for looks in (encoder, first, inner, cache)]
    assert budgets == [vtc.Budget(keep=6), vtc.Budget(keep=5), vtc.Budget(keep=4), None]
    assert inner.views[-1].memory["stages"] == [1, 3]
    assert first.views[-1].memory["stages"] == [0]
    assert first.views[-1].vision_attention(1, Rows.RECEIVED).shape == (1, 16)
    with pytest.raises(VTCError, match=r"several readings, ClassRow\(\), Received\(\); say which one is wanted"):
        first.views[-1].vision_attention(1)
    assert inner.views[-1].llm_attention(0).shape == (1, 16)
    assert handle.budget is None  # counts have no common share
    assert isinstance(handle.method, Composite)


def test_a_budget_of_everything_changes_no_bit(clip: Any) -> None:
    inputs = tiny_inputs("llava-clip", LAYOUT, extra=1)
    whole = lambda m: vtc.compress(m, ["vtc_cls", LastRowTopK()], retention=[1.0, 1.0])  # noqa: E731
    assert identical(clip, inputs, whole) == 0.0


def test_one_budget_goes_to_the_only_method_that_takes_one(clip: Any) -> None:
    with vtc.compress(clip, [FixedKeep(at=(2,)), "random"], retention=0.5) as handle:
        pass
    assert isinstance(handle.method, Composite)
    assert handle.method.budgets == (None, vtc.Budget(retention=0.5))


@pytest.mark.parametrize(
    ("parts", "positions"),
    [
        (["random", FixedKeep(at=(2,))], "compact_input"),  # numbered by the first, kept by the one inside the LLM
        ([FixedKeep(at=(0,)), LastRowTopK(layer=2)], "preserve"),
        ([FixedKeep(at=(1,)), FixedKeep(at=(2,))], "preserve"),
        ([Looks((0,), False), Looks((2,), False)], "compact"),
        ([Looks((2,), False), FixedKeep(at=(0,))], "preserve"),
    ],
)
def test_the_position_policy_serves_every_part(clip: Any, parts: Any, positions: str) -> None:
    shares = [0.8 if isinstance(part, str) or part.needs_budget else None for part in parts]
    with vtc.compress(clip, parts, retention=shares) as handle:
        assert handle.positions == positions
