"""How many operations a selection dispatches: pinned, and the same for any number of tokens and items."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vtc.testing import dispatch
from vtc.testing.released.cases import selection_cases

TABLE = Path(__file__).with_name("dispatched.json")
PINNED: dict[str, list[int]] = json.loads(TABLE.read_text())
CASES = selection_cases()
READING = {"vqtoken", "vqtoken_codebook"}
"""Whether k-means is done, on the CPU alone."""


def test_the_table_has_every_case() -> None:
    assert list(PINNED) == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_no_more_operations_than_pinned(name: str) -> None:
    most, more, reads = PINNED[name]
    redraw = f"where that has to be, `python -m vtc.testing.dispatch > tests/{TABLE.name}` draws the table again"
    for shape in dispatch.shapes(CASES[name]):
        names = dispatch.dispatched(CASES[name], shape, 2)
        found, read = names.total(), dispatch.read_back(names)
        assert found <= most, f"{name} dispatches {found} operations, {most} are pinned; {redraw}"
        assert read <= reads, f"{name} reads {read} tensors back, {reads} are pinned; {redraw}"
    assert dispatch.per_item(CASES[name]) <= more, f"an item more adds operations to {name}; {redraw}"


@pytest.mark.parametrize("name", CASES)
def test_tokens_add_no_operation(name: str) -> None:
    few, many = (dispatch.dispatched(CASES[name], shape, 2) for shape in (dispatch.SMALL, dispatch.LARGE))
    assert few.total() == many.total(), (few - many, many - few)


@pytest.mark.parametrize("name", CASES)
def test_only_kmeans_reads_back(name: str) -> None:
    assert (PINNED[name][2] > 0) == (name in READING)
