"""Methods as text: what is read, and what is refused with which words."""

from __future__ import annotations

from typing import Any

import pytest

import vtc
from vtc.errors import BudgetError, InputError, UnknownName
from vtc.method.composite import Composite
from vtc.method.text import attachable, parse


def test_commas_part_methods_and_plus_joins_them() -> None:
    entries = parse("random, fastv(layer=1, ratio=0.5) ,hiprune@0.5 + mustdrop(merge=off, filter='off')")
    assert [[(p.name, p.parameters, p.budget and p.budget.retention) for p in entry] for entry in entries] == [
        [("random", {}, None)],
        [("fastv", {"layer": 1, "ratio": 0.5}, None)],
        [("hiprune", {}, 0.5), ("mustdrop", {"merge": "off", "filter": "off"}, None)],
    ]
    assert parse(" , ") == []


VALUES = {
    "1": 1, "1e-3": 0.001, "False": False, "true": True, "null": None, "[1, 2]": [1, 2], "(2, 6)": (2, 6), "off": "off",
    "runs/a+b.safetensors": "runs/a+b.safetensors", "'a,b=c.safetensors'": "a,b=c.safetensors",
}  # fmt: skip


@pytest.mark.parametrize("text", VALUES)
def test_values(text: str) -> None:
    assert parse(f"mine(value={text})")[0][0].parameters == {"value": VALUES[text]}


def test_a_hyper_parameter_is_a_pair_and_given_once() -> None:
    with pytest.raises(InputError, match=r"'b\.safetensors' is no name=value pair"):
        parse("atp(weights=a,b.safetensors)")
    with pytest.raises(InputError, match="layer is given twice"):
        parse("fastv(layer=1,layer=2)")


@pytest.mark.parametrize("text", ["random(", "random)", "a@0.5(x=1)", "(x=1)", "a=1", "a@1@1", "a++b", "a+"])
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises((InputError, BudgetError)) as raised:
        parse(text)
    assert text.split("+")[0] in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("share", ["", "0", "1.5", "-1", "half", "64.5"])
def test_a_budget_of_its_own_is_a_fraction_or_a_number_of_tokens(share: str) -> None:
    with pytest.raises(
        BudgetError, match=r"behind @ is no retention in \(0, 1\], such as 0.25, and no number of tokens"
    ):
        parse(f"random@{share}")
    budgets = [entry[0].budget for entry in parse("random@64,random@1,random@2,random@1e-1")]
    assert budgets == [vtc.Budget(keep=64), vtc.Budget(retention=1.0), vtc.Budget(keep=2), vtc.Budget(retention=0.1)]


def test_one_method_with_its_budget() -> None:
    method, limits = attachable("fastv(layer=1)", {}, retention=0.5)
    assert (method, limits) == (vtc.create("fastv", layer=1), {"retention": 0.5, "keep": None})
    method, limits = attachable("random@0.25", {"scope": "item"}, seed=4)
    assert (method, limits["retention"]) == (vtc.create("random", scope="item", seed=4), 0.25)
    assert attachable("fastv", {"ratio": 0.5})[1] == {"retention": None, "keep": None}


def test_several_together() -> None:
    method, limits = attachable("hiprune@0.5+aim(merge=false)@0.6+mustdrop(merge=off,filter=off)", {})
    assert isinstance(method, Composite) and limits == {"retention": None, "keep": None}
    assert [budget and budget.retention for budget in method.budgets] == [0.5, 0.6, None]
    method, _ = attachable("hiprune@64+aim(merge=false)@0.6", {})
    assert isinstance(method, Composite) and method.budgets == (vtc.Budget(keep=64), vtc.Budget(retention=0.6))
    method, _ = attachable("hiprune+mustdrop(merge=off,filter=off)", {}, keep=9)
    assert isinstance(method, Composite) and [budget and budget.keep for budget in method.budgets] == [9, None]


@pytest.mark.parametrize(
    ("text", "given", "error", "words"),
    [
        ("random,stride", {}, InputError, "is a list of 2"),
        ("", {}, InputError, "is a list of 0"),
        ("random", {}, BudgetError, "neither of retention and keep"),
        ("random@0.5", {"retention": 0.5}, BudgetError, "its own budget beside"),
        ("fastv(ratio=0.5)", {"retention": 0.5}, BudgetError, "takes no retention or keep"),
        ("hiprune+aim(merge=false)", {}, BudgetError, r"such as hiprune@0\.5\+aim@0\.5"),
        ("hiprune@0.5+aim(merge=false)", {}, BudgetError, r"write aim@0\.5"),
        ("hiprune+mustdrop(merge=off,filter=off)", {}, BudgetError, "neither"),
        ("hiprun@0.5", {}, UnknownName, "did you mean 'hiprune'"),
        ("hiprune(alpa=1)@0.5", {}, UnknownName, "did you mean 'alpha'"),
    ],
)
def test_budgets_and_names_that_do_not_fit(text: str, given: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        attachable(text, {}, **given)
