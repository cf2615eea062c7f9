"""Packed sweeps: the same results in one small file, and those in the repository are about the weights that ship."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vtc.embedded import model_path
from vtc.errors import InputError
from vtc.eval.archive import SUFFIX, pack, read_scores
from vtc.eval.documents import SCORES
from vtc.eval.results import read_results, to_csv
from vtc.method.checkpoint import digests

WriteStore = Callable[..., Path]


def test_a_packed_sweep_has_the_results_of_its_folder(tmp_path: Path, write_store: WriteStore) -> None:
    cells = [("none", 1.0), ("random", 0.5), ("stride", 0.5)]
    folder = write_store(tmp_path / "mine", cells, {"t": [[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]]})
    path = pack(folder, tmp_path / "out")
    assert path.name == f"mine{SUFFIX}"
    whole, packed = read_results(folder), read_scores(path)
    assert to_csv(packed) == to_csv(whole) == to_csv(read_scores(folder)) and packed.stored == whole.stored
    assert len(packed.incomplete) == len(cells)  # no answers went along
    before = path.read_bytes()
    assert pack(folder, tmp_path / "out").read_bytes() == before


def test_what_is_no_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no sweep"):
        pack(tmp_path, tmp_path / "out")
    half = tmp_path / f"half{SUFFIX}"
    half.write_bytes(b"no archive")
    with pytest.raises(InputError, match=r"vtc\.eval\.archive FOLDER"):
        read_scores(half)


@pytest.mark.parametrize("path", sorted(SCORES.glob(f"*{SUFFIX}")), ids=lambda path: path.name.removesuffix(SUFFIX))
def test_committed_scores_are_about_the_weights_that_ship(path: Path) -> None:
    model = read_scores(path).run["model"]
    weights = digests(model_path(model["name"]))["weights"]
    assert model["fingerprint"]["weights"] == weights, f"sweep {model['name']} again, see `make results`"
