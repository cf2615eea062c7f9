"""A budget of its own for every image: what it keeps is what the image keeps alone under that budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc.errors import BudgetError
from vtc.method.budget import Budget, ItemBudgets
from vtc.testing import tiny_inputs, tiny_model

PROMPTS: list[list[Any]] = [[3, "image", 5, "image", 2], [2, "image", 9]]
METHODS = {
    "random": ("random", {}),
    "merging": ("tome", {}),
    "inside the LLM": ("fastv", {"layer": 1}),
    "two stages": ("todre", {}),
    "after the prefill": ("snapkv", {}),
}


def kept(model: Any, inputs: dict[str, Tensor], method: str, options: dict[str, Any], **budget: Any) -> list[Tensor]:
    """What every item has behind the last stage, in the order of the prompts."""
    with torch.no_grad(), vtc.compress(model, method, **budget, **options) as handle:
        model(**inputs, use_cache=True)
    (call,) = handle.trace
    return [next(reversed(item.kept.values())) for item in call.items]


@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("name", ["llava-onevision", "qwen2.5-vl"])
def test_every_image_keeps_what_it_keeps_under_its_budget(name: str, case: str) -> None:
    method, options = METHODS[case]
    model = tiny_model(name)
    inputs = tiny_inputs(name, PROMPTS, model=model)
    shares = [0.8, 0.6, 0.7]
    alike = {share: kept(model, inputs, method, options, retention=share) for share in shares}
    found = kept(model, inputs, method, options, retention=shares)
    for number, share in enumerate(shares):
        assert torch.equal(found[number], alike[share][number])
    assert len({len(each) / item for each, item in zip(found, map(len, alike[0.8]), strict=True)}) > 1


def test_numbers_may_come_as_a_tensor_of_counts() -> None:
    model = tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", PROMPTS, model=model)
    with torch.no_grad(), vtc.compress(model, "pool", keep=torch.tensor([16, 4, 1])) as handle:
        model(**inputs)
    assert handle.budget == ItemBudgets((Budget(keep=16), Budget(keep=4), Budget(keep=1)))
    assert handle.stats.calls[-1].visual_tokens_kept == (20, 1)
    assert repr(handle).count("keep=") == 3


def test_all_of_every_image_is_the_untouched_model() -> None:
    model = tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", PROMPTS, model=model)
    with torch.no_grad():
        plain = model(**inputs).logits
        with vtc.compress(model, "hiprune", keep=[16, 99, 16]):
            assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize("name", ["llava-clip", "qwen2.5-vl"])
def test_beams_share_the_budget_of_their_prompt(name: str) -> None:
    model = tiny_model(name)
    inputs = tiny_inputs(name, PROMPTS, model=model)
    wanted = {"max_new_tokens": 3, "do_sample": False}
    with torch.no_grad(), vtc.compress(model, "hiprune", retention=[0.9, 0.4, 0.6]):
        one = model.generate(**inputs, num_beams=2, **wanted)
    rows = []
    for row, shares in enumerate(([0.9, 0.4], [0.6])):
        alone = tiny_inputs(name, PROMPTS, model=model, only=row)
        with torch.no_grad(), vtc.compress(model, "hiprune", retention=shares):
            rows.append(model.generate(**alone, num_beams=2, **wanted)[0, -3:])
    assert torch.equal(one[:, -3:], torch.stack(rows))


def test_another_number_of_images_is_refused_and_leaves_no_trace() -> None:
    model = tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", PROMPTS, model=model)
    with torch.no_grad():
        plain = model(**inputs).logits
        with vtc.compress(model, "random", keep=[4, 8]) as handle:
            with pytest.raises(BudgetError, match="2 budgets for 3 images and videos of this call"):
                model(**inputs)
            output = model(**tiny_inputs("llava-clip", PROMPTS[:1], model=model))
        assert output.logits.shape[0] == 1 and handle.stats.calls[-1].visual_tokens_kept == (12,)
        assert torch.equal(model(**inputs).logits, plain)
