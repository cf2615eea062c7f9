"""A hundred thousand answers are read without being held."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vtc.eval.seen import SPAN, Seen


def test_seen_is_a_set_that_counts_and_finds() -> None:
    chance, seen, plain, places = random.Random(0), Seen(), set(), {}  # type: ignore[var-annotated]
    for place in range(3000):
        group = chance.choice("ab"), chance.choice("tu"), chance.choice("fg")
        key = (*group, chance.choice([0, 1, 5, SPAN - 1, SPAN, 3 * SPAN + 7, 10**12, chance.randrange(900)]), place % 2)
        if key not in plain:
            places.setdefault(group, []).append(place)
        plain.add(key)
        seen.add(key, place)
    assert len(seen) == len(plain) and all(key in seen for key in plain)
    assert ("a", "t", "f", 2 * SPAN, 0) not in seen and ("c", "t", "f", 0, 0) not in seen
    for cell, task, fingerprint in places:
        assert list(seen.places(cell, (task, fingerprint))) == places[cell, task, fingerprint]
        for below in (0, 1, 6, SPAN, SPAN + 1, 10**13):
            wanted = sum(key[:3] == (cell, task, fingerprint) and key[3] < below for key in plain)
            assert seen.count(cell, (task, fingerprint), below) == wanted
    for doc_id in (5, SPAN, 2 * SPAN, 10**12, 901):
        assert seen.has_document(("t", "f"), doc_id) == any(key[1:4] == ("t", "f", doc_id) for key in plain)
    assert not seen.has_document(("v", "f"), 5) and not seen.places("a", ("v", "f"))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_answers(tmp_path: Path) -> None:
    """Held as Python objects, a hundred thousand rows take 150 MiB."""
    script = Path(__file__).with_name("large_store.py")
    command = [sys.executable, str(script), "50", "2000", str(tmp_path / "stores")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(said)
    assert found["rows"] == 100_000
    for what in ("resume", "report"):
        assert found[what]["MiB"] < 16 and found[what]["seconds"] < 60, found
