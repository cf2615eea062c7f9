"""Pictures and questions that a sweep leaves beside its answers."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtc.errors import InputError
from vtc.eval.results import read_results
from vtc.eval.samples import SIDE, browsed, choose, read_samples, thumbnail, write_samples
from vtc.eval.store import Store

WriteStore = Callable[..., Path]


def scored(blobs: Any, folder: Path, write_store: WriteStore) -> Path:
    scores = [[1.0] * 10, [1.0] * 9 + [0.0], [0.0, 1.0] * 5]
    write_store(folder, [("none", 1.0), ("a", 0.5), ("b", 0.5)], {"blobs": scores}, fingerprint=blobs.fingerprint)
    write_samples(Store(folder), [blobs])
    return folder


def test_half_are_in_dispute_and_the_rest_spread_evenly() -> None:
    rng = np.random.default_rng(0)
    scores = [{str(doc): float(value) for doc, value in enumerate(rng.random(100) < 0.5)} for _ in range(5)]
    chosen = choose(scores, 20)
    variance = np.var([[each[str(doc)] for doc in range(100)] for each in scores], axis=0)
    disputed = [doc for doc, why in chosen.items() if why == "cells disagree"]
    even = [doc for doc, why in chosen.items() if why == "spread evenly"]
    assert len(disputed) == len(even) == 10 and not set(disputed) & set(even)
    assert min(variance[disputed]) >= max(np.delete(variance, disputed))
    assert even == sorted(even) and max(np.diff(even)) <= 9 + 10  # of 90, between which the disputed may lie


def test_equal_cells_dispute_nothing_and_a_small_task_is_shown_whole() -> None:
    same = {"0": 1.0, "3": 0.0}
    assert choose([same, same], 20) == {0: "spread evenly", 3: "spread evenly"}
    assert choose([], 20) == {}


def test_a_sweep_leaves_pictures_questions_and_targets(blobs: Any, tmp_path: Path, write_store: WriteStore) -> None:
    folder = scored(blobs, tmp_path, write_store)
    samples = read_samples(folder, "blobs", blobs.fingerprint)
    assert sorted(sample["doc_id"] for sample in samples) == list(range(10))
    assert samples[0]["why"] == "cells disagree"
    first = next(sample for sample in samples if sample["doc_id"] == 0)
    assert (first["question"], first["target"], first["of"]) == ("What color is the ring?", "red", 1)
    (picture,) = first["pictures"]
    with Image.open(io.BytesIO(base64.b64decode(picture.split(",")[1]))) as image:
        assert (image.format, image.size) == ("WEBP", (120, 90))
    assert read_samples(folder, "blobs", "changed since") == []
    assert read_samples(folder, "another", "f") == []


def test_a_browser_gets_the_answers_of_every_cell(blobs: Any, tmp_path: Path, write_store: WriteStore) -> None:
    results = read_results(scored(blobs, tmp_path, write_store))
    shown = browsed(Store(tmp_path), results.run, results.lines, results.stored)["blobs"]
    assert [(cell["method"], cell["retention"]) for cell in shown["cells"]] == [("none", 1.0), ("a", 0.5), ("b", 0.5)]
    last = next(sample for sample in shown["samples"] if sample["doc_id"] == 9)
    assert last["answers"] == ["answer 1", "answer 0", "answer 1"] and last["scores"] == [1.0, 0.0, 1.0]
    assert last["kept"] == [None, None, None] and last["places"] == [[0, 0, 1]]


def test_samples_of_earlier_versions_show_no_kept_tokens(blobs: Any, tmp_path: Path, write_store: WriteStore) -> None:
    results = read_results(scored(blobs, tmp_path, write_store))
    path = tmp_path / "samples" / "blobs.json"
    content = json.loads(path.read_text())
    for sample in content["samples"]:
        del sample["places"]
    path.write_text(json.dumps(content))
    shown = browsed(Store(tmp_path), results.run, results.lines, results.stored)["blobs"]
    assert shown["samples"][0]["kept"] == [None, None, None]


def test_thumbnails_are_small_and_keep_their_shape() -> None:
    data = thumbnail(Image.new("RGBA", (2000, 500), "green"))
    with Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))) as image:
        assert image.size == (SIDE, SIDE // 4)


def test_damaged_samples_are_named(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "t.json").write_text('{"fingerprint": "f"')
    with pytest.raises(InputError, match=r"t\.json: not readable as samples .*; remove it and go on"):
        read_samples(tmp_path, "t", "f")
