"""V2Drop against the inputs of the model's own layers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import vtc
from vtc.errors import BudgetError, UnsupportedMethod, VTCError
from vtc.method.base import ModelSpec, Needs
from vtc.testing import TINY_MODELS, tiny_inputs, tiny_model

LLAMA = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32)
PUBLISHED = {"ratios": (0.5, 0.25, 0.0)}
LAYOUT: list[list[Any]] = [[4, "image", 3, "image", 5], [2, "image", 12], [9]]


def left(view: Any, **options: Any) -> list[list[int]]:
    """Tokens of each item before and behind every stage that drops."""
    method: Any = vtc.create("v2drop", **options)
    counts = [view.items.counts]
    for start in method.starts(view.model):
        here = dataclasses.replace(view.items, counts=counts[-1])
        counts.append(method.left(dataclasses.replace(view, items=here), start))
    return [list(column) for column in zip(*counts, strict=True)]


def test_the_published_setting_and_its_mean(make_view: Any) -> None:
    assert not vtc.create("v2drop", **PUBLISHED).needs_budget
    view = make_view([(24, 24), (1, 1)], spec=LLAMA)
    assert left(view, **PUBLISHED) == [[576, 288, 144, 1], [1, 1, 1, 1]]
    mean = (3 * 576 + 14 * 288 + 5 * 144 + 10) / 32  # 202.8 tokens
    (counts,) = left(make_view([(24, 24)], spec=LLAMA, keep=round(mean)))
    spans = zip((3, 14, 5, 10), counts, strict=True)
    assert abs(sum(span * count for span, count in spans) / 32 - round(mean)) <= 0.5
    with pytest.raises(BudgetError, match="3 of 32 LLM layers see 576 tokens"):
        left(make_view([(24, 24)], spec=LLAMA, retention=0.09))


def best(scores: list[float], keep: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:keep])


@pytest.mark.parametrize("name", ["llava-clip", "llava-siglip", "qwen2.5-vl", "internvl"])
@pytest.mark.parametrize("layers", [(8, 24), (8, 16)])
@torch.no_grad()
def test_what_changed_most_stays(name: str, layers: tuple[int, ...]) -> None:
    """Four layers: before 1 and 3, and before 1 and 2, where tokens leave while the next change is noted."""
    model = tiny_model(name)
    first, second = (layer // 8 for layer in layers)
    inputs: dict[int, list[torch.Tensor]] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, number=number: inputs.setdefault(number, []).append(
                args[0] if args else kwargs["hidden_states"]
            ),
            with_kwargs=True,
        )
        for number, layer in enumerate(model.model.language_model.layers)
    ]
    given = tiny_inputs(name, LAYOUT, seed=2, model=model)
    model(**given)
    with vtc.compress(model, "v2drop", layers=layers, ratios=(0.5, 0.25)) as handle:
        model(**given)
    for hook in hooks:
        hook.remove()
    whole = [inputs[number][0] for number in range(4)]
    for item in handle.trace[0].items:
        change = (whole[first][item.row] - whole[first - 1][item.row]).norm(dim=-1)[item.positions].tolist()
        assert item.kept[first].tolist() == best(change, max(1, int(len(change) * 0.5)))
        assert len(item.kept[second]) == max(1, int(len(change) * 0.25))
        assert set(item.kept[second].tolist()) <= set(item.kept[first].tolist())


@torch.no_grad()
def test_the_second_stage_compares_the_rows_that_are_left() -> None:
    """Layers 1 and 2 of the short prompt, run by hand."""
    model = tiny_model("llava-clip")
    given = tiny_inputs("llava-clip", [[4, "image", 5]], seed=2)
    around: dict[str, torch.Tensor] = {}
    layer = model.model.language_model.layers[1]

    def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        around["before"] = args[0] if args else kwargs["hidden_states"]
        around["behind"] = output[0] if isinstance(output, tuple) else output

    with vtc.compress(model, "v2drop", layers=(8, 16), ratios=(0.5, 0.25)) as handle:
        hook = layer.register_forward_hook(note, with_kwargs=True)
        model(**given)
        hook.remove()
    (item,) = handle.trace[0].items
    first = item.kept[1].tolist()
    change = (around["behind"] - around["before"]).norm(dim=-1)[0, 4 : 4 + len(first)].tolist()
    assert item.kept[2].tolist() == [first[j] for j in best(change, len(item.positions) // 4)]


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_budget_is_met_on_every_model(name: str, nears_budget: Any) -> None:
    nears_budget(name, "v2drop", (0.5, 0.9))


def test_plans_and_refusals() -> None:
    method: Any = vtc.create("v2drop")
    assert dataclasses.asdict(method) == {"layers": (3, 17, 22), "ratios": None, "schedule": None}
    assert method.plan(LLAMA) == vtc.Plan((2, 3, 16, 17, 21, 22), Needs(), "preserve")
    assert method.starts(dataclasses.replace(LLAMA, llm_layers=28)) == (3, 15, 19)
    assert method.starts(dataclasses.replace(LLAMA, llm_layers=4)) == (1, 2, 3)
    for layers in ((), (0, 3), (3, 3), (4, 2), (3, 32)):
        with pytest.raises(VTCError, match="must rise, begin at 1 or later and end at 31 at the latest"):
            vtc.create("v2drop", layers=layers)
    for ratios in ((0.5, 0.2), (0.2, 0.5, 0.1), (1.0, 0.5, 0.1)):
        with pytest.raises(VTCError, match="must fall and lie between 0 and 1, one for each of 3 layers"):
            vtc.create("v2drop", ratios=ratios)
    with pytest.raises(UnsupportedMethod, match="are 1 of this llava model's 2 LLM layers"):
        vtc.create("v2drop", **PUBLISHED).plan(dataclasses.replace(LLAMA, llm_layers=2))
