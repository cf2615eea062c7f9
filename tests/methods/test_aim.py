"""AIM against its equations: merging group by group, counts layer by layer, ranking token by token; then on models."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import vtc
from vtc.errors import BudgetError, UnsupportedMethod, VTCError
from vtc.method.base import PRE_LLM, EncoderStage, ModelSpec, Rows
from vtc.method.parts import groups, share
from vtc.methods.aim.method import AIM, Importance
from vtc.methods.aim.schedule import entering_tokens, falling_shares, moved_tokens
from vtc.ops.merge import merge_plan
from vtc.testing import TINY_MODELS, tiny_inputs, tiny_model
from vtc.testing.plain import importance as plain_importance
from vtc.testing.plain import merge as plain

GOLDEN = Path(__file__).parents[1] / "golden" / "aim"
VICUNA = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32, encoder_stages=True, single_crop=True)
ONEVISION = ModelSpec("llava-onevision", 27, 26, False, tuple(range(27)), 28)
QWEN = ModelSpec("qwen2_vl", 32, 31, False, tuple(range(32)), 28, mrope=True)
NEXT = dataclasses.replace(VICUNA, family="llava-next", single_crop=False)


# --- how much
def test_defaults_and_refusals() -> None:
    assert dataclasses.asdict(vtc.create("aim")) == {
        "merge": True, "prune": True, "schedule": None, "merge_ratio": None, "steps": None, "metric": "auto",
        "scope": "crop", "order": "official", "tau": 0.1, "iterations": 5, "damping": 0.0, "votes": "alive",
    }  # fmt: skip
    refused: list[tuple[dict[str, Any], str]] = [
        ({"merge": False, "prune": False}, "leave nothing to do"),
        ({"schedule": (22, 14)}, r"schedule=\(22, 14\) is no pair of layers l1 < l2"),
        (
            {"schedule": (14,)},
            r"schedule=\(14,\) of 'aim' is not a tuple of 2 whole numbers or None; .* schedule=\(2, 4\)",
        ),
        ({"schedule": (14, 14)}, "is no pair of layers"),
        ({"merge_ratio": 0.0}, r"merge_ratio=0.0 is outside \(0, 1\]; the paper uses 0.25"),
        ({"merge_ratio": 0.25, "steps": (98, 49)}, "pass one of them"),
        ({"steps": (98, -1)}, "holds negative counts"),
        ({"metric": "values"}, "unknown metric 'values'"),
        ({"order": "rastr"}, "unknown order 'rastr'; did you mean 'raster'"),
        ({"votes": "all"}, "unknown votes 'all'"),
        ({"scope": "frame"}, "unknown scope 'frame'"),
        ({"tau": 0.0}, "rank nothing; use a positive tau"),
        ({"iterations": 0}, "rank nothing"),
        ({"damping": 1.0}, "rank nothing"),
    ]
    for options, message in refused:
        with pytest.raises(VTCError, match=message):
            vtc.create("aim", **options)


def test_when_a_budget_is_needed() -> None:
    assert AIM().needs_budget
    assert AIM(prune=False).needs_budget
    assert AIM(merge=False).needs_budget
    assert AIM(schedule=(14, 22)).needs_budget
    assert not AIM(merge_ratio=0.25).needs_budget
    assert not AIM(steps=(98, 49)).needs_budget
    assert not AIM(merge=False, schedule=(14, 22)).needs_budget


@pytest.mark.parametrize(
    ("layers", "bounds", "total"),
    [(28, (14, 22), 18.5), (32, (13, 21), 17.5), (36, (18, 28), 23.5), (24, (12, 19), 16), (4, (2, 3), 3)],
)
def test_the_default_schedule(layers: int, bounds: tuple[int, int], total: float) -> None:
    model = dataclasses.replace(ONEVISION, llm_layers=layers)
    assert AIM().bounds(model) == bounds
    l1, l2 = bounds
    shares = AIM().shares(model)
    assert shares == pytest.approx([min(1, max(0, 1 - (layer - l1) / (l2 - l1))) for layer in range(layers)])
    assert sum(shares) == pytest.approx(total)


def test_published_counts() -> None:
    """32 frames of LLaVA-OneVision at 25 %: 1568 tokens and the newline; the counts of the stored tiny LLM."""
    assert AIM().layer_counts(ONEVISION, 1569, None) == [1569] * 15 + [1372, 1176, 980, 784, 588, 392, 196] + [0] * 6
    assert AIM().layer_counts(ONEVISION, 150, None)[14:23] == [150, 131, 112, 93, 75, 56, 37, 18, 0]
    assert AIM(schedule=(21, 22)).layer_counts(ONEVISION, 10, None) == [10] * 22 + [0] * 6
    assert AIM(schedule=(28, 29)).layer_counts(ONEVISION, 10, None) == [10] * 28


SPECS = st.sampled_from(
    [VICUNA, ONEVISION, dataclasses.replace(QWEN, llm_layers=36), dataclasses.replace(QWEN, llm_layers=5)]
)


@given(SPECS, st.integers(1, 6000), st.integers(0, 40), st.floats(0.01, 0.999))
def test_merging_and_pruning_meet_the_budget(model: ModelSpec, count: int, fixed: int, retention: float) -> None:
    granted = vtc.tokens_to_keep(count + fixed, retention)
    method = AIM()
    keep = method.merged_count(model, count, fixed, granted)
    counts = method.layer_counts(model, keep + fixed, granted)
    first = method.bounds(model)[0]
    assert 1 <= keep <= count
    assert counts == sorted(counts, reverse=True)
    assert set(counts[: first + 1]) == {keep + fixed}  # stages begin behind l1
    mean = sum(counts) / model.llm_layers
    least = sum(math.floor((1 + fixed) * r + 1e-9) for r in method.shares(model)) / model.llm_layers
    assert abs(mean - granted) <= max(1, 0.01 * granted) or (keep == 1 and mean == pytest.approx(least))
    if mean > granted and keep < count and keep > 1:
        assert method.layer_counts(model, keep + fixed, granted) == method.layer_counts(model, keep + fixed, None)


@given(SPECS, st.integers(1, 6000), st.floats(0.05, 0.999))
def test_pruning_alone_meets_the_budget(model: ModelSpec, count: int, retention: float) -> None:
    granted = vtc.tokens_to_keep(count, retention)
    try:
        counts = AIM(merge=False).layer_counts(model, count, granted)
    except BudgetError:
        assert granted + 1 < count / model.llm_layers
        return
    assert counts[0] == count
    assert counts == sorted(counts, reverse=True)
    assert abs(sum(counts) / model.llm_layers - granted) <= 1


@pytest.mark.parametrize(
    ("entered", "granted", "layers", "bounds", "counts"),
    [
        (576, 227, 28, (14, 22), [576] * 7 + [542, 470, 398, 326, 254, 182, 110, 38] + [0] * 13),
        (144, 69, 32, (16, 25), [144] * 11 + [133, 117, 101, 85, 69, 53, 37, 21, 5] + [0] * 12),
        (352, 247, 28, (14, 22), [352] * 16 + [314, 270, 226, 182, 138, 94, 50, 6] + [0] * 4),
        (6, 3, 41, (20, 32), [6] * 15 + [5, 5, 4, 4, 3, 3, 2, 2, 1, 1] + [0] * 16),
        (10, 4, 5, (2, 3), [10, 10] + [0] * 3),
    ],
)
def test_moved_schedules_stay_what_they_were(
    entered: int, granted: int, layers: int, bounds: tuple[int, int], counts: list[int]
) -> None:
    """Where several layers change at once, rounding must not part them."""
    assert list(moved_tokens(entered, granted * layers, layers, *bounds)) == counts


@pytest.mark.parametrize(
    ("count", "fixed", "granted", "layers", "bounds", "entering"),
    [
        (576, 0, 144, 32, (13, 21), 263),
        (576, 24, 72, 32, (13, 21), 108),
        (1569, 27, 400, 28, (14, 22), 579),
        (9, 12, 1, 8, (4, 6), 1),
        (33, 0, 33, 8, (4, 6), 33),
    ],
)
def test_entering_counts_stay_what_they_were(
    count: int, fixed: int, granted: int, layers: int, bounds: tuple[int, int], entering: int
) -> None:
    assert entering_tokens(count, fixed, granted * layers, falling_shares(layers, *bounds)) == entering


def test_budgets_that_cannot_be_met() -> None:
    with pytest.raises(BudgetError, match=r"1 of 28 LLM layers .* at least 22 tokens .* or merge more"):
        AIM(merge=False).layer_counts(ONEVISION, 600, 6)
    with pytest.raises(BudgetError, match=r"schedule=\(7, 8\) leaves 171.4 of 600 without any merging"):
        AIM(schedule=(7, 8)).merged_count(ONEVISION, 600, 0, 300)


# --- where
def test_plans() -> None:
    plan = AIM().plan(VICUNA)  # CLIP: before the projector, on the keys of the last layer
    assert plan.stages == (EncoderStage(23), *range(14, 32))
    assert plan.needs.vision == {23: Rows.KEYS}
    assert plan.needs.llm == dict.fromkeys(range(13, 31), Importance())
    assert plan.positions == "compact_input"
    for model in (ONEVISION, QWEN, NEXT):
        plan = AIM(merge_ratio=0.25).plan(model)
        l1, l2 = AIM().bounds(model)
        assert plan.stages == (PRE_LLM, *range(l1 + 1, l2 + 1))
        assert plan.needs == vtc.Needs(llm=dict.fromkeys(range(l1, l2 - 1), Importance()))  # the layers that rank
    plan = AIM(merge=False).plan(ONEVISION)
    assert plan.stages == tuple(range(1, 28))
    assert AIM(schedule=(21, 29)).plan(ONEVISION).stages == (PRE_LLM, *range(22, 28))
    assert AIM(schedule=(28, 29)).plan(ONEVISION).stages == (PRE_LLM,)
    with pytest.raises(UnsupportedMethod, match=r"schedule=\(28, 29\) begins behind the 28 layers"):
        AIM(merge=False, schedule=(28, 29)).plan(ONEVISION)
    assert AIM(prune=False).plan(ONEVISION).positions == "compact_input"
    assert AIM(prune=False).plan(QWEN).positions == "preserve"
    assert AIM(prune=False, metric="keys").plan(QWEN) == vtc.Plan((PRE_LLM,), vtc.Needs({31: Rows.KEYS}), "preserve")
    assert AIM(prune=False, metric="features").plan(VICUNA) == vtc.Plan((PRE_LLM,), vtc.Needs(), "compact_input")


# --- merging
def plain_merge(x: Tensor, metric: Tensor, sizes: list[int], keep: int) -> list[tuple[Tensor, list[int]]]:
    """Rows [k, D] and the token each row stands for, of every group of one item, whose tokens lie side by side."""
    done, first = [], 0
    for size, count in zip(sizes, share(keep, sizes), strict=True):
        rows, values = x[first : first + size].double(), metric[first : first + size].double()
        anchors = list(range(first, first + size))
        while len(rows) > count:
            targets, stands = plain.decide(values, min(len(rows) // 2, len(rows) - count), "similarity", 0)
            pick = [[old for old, row in enumerate(targets) if row == new] for new in range(len(stands))]
            rows, values = (torch.stack([each[old].mean(0) for old in pick]) for each in (rows, values))
            anchors = [anchors[old] for old in stands]
        done.append((rows.float(), anchors))
        first += size
    return done


@pytest.mark.parametrize("order", ["official", "raster"])
@pytest.mark.parametrize(
    "budget", [{"retention": 0.25}, {"retention": 0.7}, {"keep": 5}, {"keep": 2}, {"keep": 1}], ids=str
)
def test_the_plain_merge(make_view: Any, kept: Any, shape: Any, order: Any, budget: Any) -> None:
    shapes = [(7, 9), shape(((3, 4, 5),)), (1, 1), shape(((1, 3, 3), (1, 4, 5)))]
    sizes = [[63], [20] * 3, [1], [9, 20]]
    view = make_view(shapes, spec=ONEVISION, **budget)
    selection = AIM(prune=False, order=order).select(view)
    assert selection is not None
    numbers = kept(view, selection)
    for item, each in enumerate(sizes):
        total = sum(each)
        keep = view.budget.tokens(total)
        own = each if keep >= len(each) else [total]  # across frames where there are too few
        expected = plain_merge(view.tokens[item, :total], view.tokens[item, :total], own, keep)
        assert len(numbers[item]) == keep
        for rows, anchors in expected:
            seats = anchors if order == "raster" else sorted(anchors)
            assert set(seats) <= set(numbers[item])
            assert torch.allclose(selection.tokens[item, seats], rows, atol=1e-5)
        into = selection.merged_into[item, :total]
        assert sorted(set(into.tolist())) == numbers[item]
        if order == "raster":
            assert into[numbers[item]].tolist() == numbers[item]


def test_literal_steps_and_ratio(make_view: Any, kept: Any, shape: Any) -> None:
    view = make_view([shape(((4, 14, 14),)), (14, 14)], spec=ONEVISION)
    by_steps, by_ratio = AIM(steps=(98, 49)).select(view), AIM(merge_ratio=0.25).select(view)
    assert by_steps is not None
    assert by_ratio is not None
    assert [len(each) for each in kept(view, by_steps)] == [196, 49]
    assert torch.equal(by_steps.tokens, by_ratio.tokens)
    odd = AIM(steps=(98, 24)).select(view)
    assert odd is not None
    assert odd.counts == [4 * 74, 74]
    capped = AIM(steps=(150, 10)).select(view)  # no step merges more than half
    assert capped is not None
    assert capped.counts == [4 * 88, 88]
    assert [len(each) for each in kept(view, capped)] == [4 * 88, 88]
    assert AIM(merge_ratio=1.0).select(view) is None


def test_keys_decide_and_features_are_averaged(make_view: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(144, 8, generator=generator)
    view = make_view([(12, 12)], spec=VICUNA, vision={(23, Rows.KEYS): [keys]}, stage=EncoderStage(23), keep=36)
    selection = AIM(prune=False).select(view)
    assert selection is not None
    ((rows, anchors),) = plain_merge(view.tokens[0], keys, [144], 36)
    assert torch.allclose(selection.tokens[0, sorted(anchors)], rows, atol=1e-5)


@pytest.mark.parametrize(("keep", "sizes"), [(10, [5, 5, 7]), (3, [100, 1, 1]), (5, [0, 9, 1]), (4, [4])])
def test_every_group_keeps_something(keep: int, sizes: list[int]) -> None:
    found = share(keep, sizes)
    assert sum(found) == keep
    assert all((count > 0) == (size > 0) and count <= size for count, size in zip(found, sizes, strict=True))


def test_groups_after_tokens_were_dropped(make_view: Any, shape: Any) -> None:
    """Sizes that only the device knows are counted there; empty frames are left out."""
    view = make_view([shape(((3, 2, 4),)), (3, 3)], spec=ONEVISION)
    keep = torch.zeros_like(view.items.mask)
    keep[0, [0, 3, 17, 18, 23]], keep[1, 2:7] = True, True
    moved = torch.arange(view.hidden.shape[1])[None]
    fewer = dataclasses.replace(view, items=view.items.kept(keep, (5, 5), moved))
    crop, sizes = groups(fewer, "crop")
    assert sizes == [[2, 0, 3], [5, 0, 0]]
    assert crop.tolist() == [[0, 0, 2, 2, 2], [0] * 5]
    selection = AIM(prune=False, merge_ratio=0.6).select(fewer)
    assert selection is not None
    assert selection.counts == [3, 3]
    assert [set(row[:2].tolist()) <= {0, 1} for row in selection.merged_into[:1]] == [True]


# --- pruning
@pytest.mark.parametrize("newlines", [False, True])
def test_the_plain_ranking(make_view: Any, shape: Any, newlines: bool) -> None:
    """At every stage the floor of the share, by score, the earlier place first; separators are ranked alike."""
    method = AIM(merge=False, schedule=(1, 5))
    layers, shapes = 6, [shape(((1, 4, 5),), newlines=newlines), (3, 3)]
    model = dataclasses.replace(ONEVISION, llm_layers=layers)
    memory: dict[Any, Any] = {}
    for layer in range(2, 5):
        scores = torch.rand(1, 64).mul(4).round()  # ties everywhere
        view = make_view(shapes, spec=model, stage=layer, llm={(layer - 1, method.reading): scores})
        view = dataclasses.replace(view, memory=memory)
        selection = method.select(view)
        assert selection is not None
        for item in range(2):
            places = view.items.index[item][view.items.mask[item]].tolist()
            places += view.separators.index[item][view.separators.mask[item]].tolist()
            row = int(view.items.row[item])
            count = math.floor(len(places) * (1 - (layer - 1) / 4))
            expected = sorted(sorted(places, key=lambda p: (-scores[row, p].item(), p))[:count])
            found = view.items.index[item][selection.keep[item] & view.items.mask[item]].tolist()
            if newlines:
                found += view.separators.index[item][selection.separators[item] & view.separators.mask[item]].tolist()
            assert sorted(found) == expected
    last = make_view(shapes, spec=model, stage=5)
    selection = method.select(dataclasses.replace(last, memory=memory))
    assert selection is not None
    assert (selection.counts, selection.separators) == ([0, 0], False)


# --- on models
@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    """The stored tiny 28-layer Qwen2, and what the released code kept after each layer."""
    spec = importlib.util.spec_from_file_location("golden_llm", GOLDEN.parents[1] / "golden_checks" / "_llm.py")
    assert spec is not None
    assert spec.loader is not None
    llm = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(llm)
    tensors = load_file(GOLDEN / "case4.safetensors")
    config = json.loads((GOLDEN / "case4.json").read_text())["hyperparameters"]["config"]
    model = llm.build(config, llm.weights(tensors, "param."), image=150)
    return {"llm": llm, "tensors": tensors, "model": model}


def run(stored: dict[str, Any], method: Any, **options: Any) -> Any:
    tensors = stored["tensors"]
    embeds, decode = tensors["input.inputs_embeds"], tensors["input.decode_embeds"]
    return stored["llm"].run(stored["model"], embeds, decode, start=14, image=150, method=method, **options)


def test_removed_tokens_do_not_vote(stored: dict[str, Any]) -> None:
    """The overlaps with the released code's choices are those measured with another implementation of the rule."""
    found = run(stored, AIM(merge=False, schedule=(14, 22)))
    expected = stored["tensors"]["output.valid_after_layer"][:, 14:164]
    assert [len(found.kept[layer + 1]) for layer in range(14, 22)] == [131, 112, 93, 75, 56, 37, 18, 0]
    overlap = [int(expected[layer][found.kept[layer + 1]].sum()) for layer in range(14, 21)]
    assert overlap == [131, 112, 92, 73, 51, 29, 15]
    assert found.lengths == [184] * 15 + [165, 146, 127, 109, 90, 71, 52] + [34] * 6


@dataclasses.dataclass(frozen=True)
class Prescribed(AIM):
    """Removes what the released code hid."""

    def _prune(self, view: Any, layer: int) -> Any:
        alive = VALID[layer - 1, 14:164][view.items.token[0]][None]
        return vtc.Selection(alive & view.items.mask)


VALID = load_file(GOLDEN / "case4.safetensors")["output.valid_after_layer"]


def test_removing_equals_hiding(stored: dict[str, Any]) -> None:
    """Given the same choices, removal gives the released code's hidden states and its decoding without the fault."""
    found = run(stored, Prescribed(merge=False, schedule=(14, 22)))
    tensors = stored["tensors"]
    text = torch.tensor([*range(14), *range(164, 184)])
    assert torch.allclose(found.states[0], tensors["output.last_hidden_state"][text], atol=2e-4)
    assert torch.allclose(torch.cat(found.states[1:]), tensors["output.decode_corrected"], atol=2e-4)
    hidden = run(stored, AIM(merge=False, schedule=(14, 22), votes="masked"))
    assert torch.allclose(torch.cat(hidden.states[1:]), torch.cat(found.states[1:]), atol=2e-5)
    assert hidden.lengths == [184] * 28


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("options", [{}, {"merge": False}, {"prune": False}], ids=str)
@pytest.mark.parametrize("retention", [0.3, 0.5, 0.85])
def test_the_mean_over_the_layers_meets_the_request(name: str, options: Any, retention: float) -> None:
    model = tiny_model(name, layers=8)
    for kind in TINY_MODELS[name].kinds:
        inputs = tiny_inputs(name, [[4, kind, 3], [2, kind, 12]], seed=3, model=model)
        with torch.no_grad(), vtc.compress(model, "aim", retention=retention, **options) as handle:
            model(**inputs)
        call = handle.stats.calls[0]
        for before, mean in zip(call.visual_tokens_in, call.visual_tokens_kept, strict=True):
            assert abs(mean - vtc.tokens_to_keep(before, retention)) <= 1


def test_no_visual_token_is_left_behind_the_schedule() -> None:
    """Separators go too: the layers from l2 on see the text alone."""
    model = tiny_model("llava-next", layers=8)
    inputs = tiny_inputs("llava-next", [[4, "image", 3], [2, "image", 12]], seed=3, model=model)
    with torch.no_grad(), vtc.compress(model, AIM(merge_ratio=0.5, schedule=(2, 5))) as handle:
        model(**inputs)
    rows = handle.stats.calls[0].layer_rows
    assert rows[0] == rows[2] > rows[3] > rows[4] > rows[5]
    assert set(rows[5:]) == {14}
    assert all(len(item.kept[5]) == 0 for item in handle.trace[0].items)


def test_merging_before_the_projector(clip: Any, limits: Any) -> None:
    """The LLM gets the projected means of what the encoder's last layer calls alike."""
    inputs = tiny_inputs("llava-clip", [[3, "image", 5]])
    tower = clip.model.vision_tower
    seen: dict[str, Tensor] = {}
    attention = vtc.adapters.of(clip).vision_attention[3]
    hook = attention.k_proj.register_forward_hook(lambda module, args, out: seen.__setitem__("keys", out))
    with torch.no_grad():
        hidden = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
    hook.remove()
    rows: list[Tensor] = []
    first = clip.model.language_model.layers[0]
    hook = first.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad(), vtc.compress(clip, AIM(prune=False), keep=5) as handle:
        clip(**inputs)
    hook.remove()
    count = hidden.shape[1] - 1
    assert merge_plan(count, 5) == [8, 3]
    ((merged, _),) = plain_merge(hidden[0, 1:], seen["keys"][0, 1:], [count], 5)
    with torch.no_grad():
        expected = clip.model.multi_modal_projector(merged[None])[0]
    assert float((rows[0][0, 3:8] - expected).abs().max()) <= limits.hidden
    assert handle.stats.calls[0].visual_tokens_kept == (5.0,)


@pytest.mark.parametrize("first", [{"merge": True, "prune": False}, None], ids=["aim", "pool"])
def test_the_halves_combine_with_others(first: Any) -> None:
    """Another method, or merging alone, before the LLM; pruning alone inside it, on its share of what arrives."""
    model = tiny_model("llava-siglip", layers=8)
    inputs = tiny_inputs("llava-siglip", [[3, "image", 5]], model=model)
    before = AIM(**first) if first else vtc.create("pool")
    for second, retention in ((AIM(merge=False, schedule=(2, 6)), [0.5, None]), (AIM(merge=False), [0.5, 0.5])):
        with torch.no_grad(), vtc.compress(model, [before, second], retention=retention) as handle:
            model(**inputs)
        entered = handle.stats.calls[0].stages[0].visual_tokens_out
        counts = second.layer_counts(
            vtc.adapters.of(model).spec, entered, None if second.schedule else vtc.tokens_to_keep(entered, 0.5)
        )
        assert handle.stats.calls[0].layer_rows == tuple(8 + count for count in counts)


def test_importance_is_read_only_where_it_ranks(monkeypatch: Any) -> None:
    seen: list[int] = []
    original = Importance.read

    def read(self: Importance, attention: Any, rows: Any) -> Tensor:
        seen.append(attention.query.shape[2])
        return original(self, attention, rows)

    monkeypatch.setattr(Importance, "read", read)
    model = tiny_model("internvl", layers=8)
    with torch.no_grad(), vtc.compress(model, AIM(merge_ratio=0.5, schedule=(2, 5))) as handle:
        model(**tiny_inputs("internvl", [[4, "image", 3]], model=model))
    assert tuple(seen) == handle.stats.calls[0].layer_rows[2:4]  # l1 <= l < l2 - 1


@pytest.mark.parametrize(
    "options",
    [{"tau": 2.0}, {"iterations": 1}, {"damping": 0.9}, {"tau": 0.5, "iterations": 3, "damping": 0.3}],
    ids=str,
)
def test_importance_has_the_options_of_the_method(options: dict[str, Any], monkeypatch: Any) -> None:
    """What is kept is what the plain ranking with these options keeps, and not what it keeps without them."""
    calls: list[tuple[Any, Any]] = []
    original = Importance.read

    def read(self: Importance, attention: Any, rows: Any) -> Tensor:
        calls.append((attention, rows))
        return original(self, attention, rows)

    monkeypatch.setattr(Importance, "read", read)
    model = tiny_model("llava-siglip", layers=6)
    inputs = tiny_inputs("llava-siglip", [[4, "image", 3, "image", 5], [2, "image", 9]], seed=3)
    with torch.no_grad(), vtc.compress(model, AIM(merge=False, schedule=(1, 4), **options)) as handle:
        model(**inputs)
    attention, rows = calls[0]
    assert len(calls) == 2

    def expected(**given: Any) -> list[list[int]]:
        score = plain_importance.pagerank(
            attention.query, attention.key, attention.scaling, mask=rows.mask, causal=True, voters=rows.prompt, **given
        )
        best = []
        for item in handle.trace[0].items:
            own = score[item.row, item.positions].tolist()
            best.append(sorted(sorted(range(len(own)), key=lambda j: (-own[j], j))[: len(own) * 2 // 3]))
        return best

    assert [item.kept[2].tolist() for item in handle.trace[0].items] == expected(**options)
    others = [expected(**{k: v for k, v in options.items() if k != left_out}) for left_out in options]
    assert all(other != expected(**options) for other in others)


@pytest.mark.parametrize("retention", [0.2, 0.45, 0.8])
def test_layers_that_turn_out_not_to_rank_are_not_read(retention: float, monkeypatch: Any) -> None:
    """A budget that moves the schedule could prune anywhere; most layers are not read then."""
    seen: list[int] = []
    original = Importance.read

    def read(self: Importance, attention: Any, rows: Any) -> Tensor:
        seen.append(attention.query.shape[2])
        return original(self, attention, rows)

    monkeypatch.setattr(Importance, "read", read)
    model = tiny_model("llava-siglip", layers=8)
    with torch.no_grad(), vtc.compress(model, AIM(), retention=retention) as handle:
        model(**tiny_inputs("llava-siglip", [[4, "image", 3]], model=model))
    rows, layers = handle.stats.calls[0].layer_rows, list(handle.plan.needs.llm)
    ranked = [layer for layer in layers if rows[layer + 1] < rows[layer] and rows[layer + 1] > 7]
    # The counts are fixed at the first stage, so the layer in front of it is read in any case.
    assert seen == [rows[layer] for layer in layers if layer in ranked or layer == layers[0]]
    assert len(seen) < len(layers)
