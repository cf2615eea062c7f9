"""The embedded model loads like any checkpoint and answers held-out questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vtc.embedded import model_path
from vtc.errors import InputError
from vtc.eval.tiny.benchmark import benchmark_rows
from vtc.eval.tiny.checking import accuracy, load_model
from vtc.eval.tiny.questions import FAMILIES

FOLDER = model_path("tiny-llava")
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "tiny_model.md"


def test_the_folder_is_small_and_says_how_it_was_made() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 6_000_000
    text = (FOLDER / "training.json").read_text()
    record = json.loads(text)
    assert set(record["held_out"]["accuracy"]) == {*FAMILIES, "mean"}
    assert record["held_out"]["accuracy"]["mean"] >= 0.95
    assert min(record["held_out"]["accuracy"].values()) >= 0.90
    assert "/" not in text.replace("training.json", "")


def test_the_documentation_quotes_the_recorded_accuracy() -> None:
    accuracy_of = json.loads((FOLDER / "training.json").read_text())["held_out"]["accuracy"]
    rows = [line.strip("|").split("|") for line in DOCUMENT.read_text().splitlines() if line.startswith("|")]
    names = next(row for row in rows if row[0].strip() == "existence" and len(row) == 10)
    values = rows[rows.index(names) + 2]
    quoted = {name.strip(): value.strip() for name, value in zip(names, values, strict=True)}
    assert quoted == {name: f"{100 * value:.1f} %" for name, value in accuracy_of.items()}


def test_it_answers_held_out_questions() -> None:
    shares = accuracy(FOLDER, benchmark_rows(17, "check", 200_000))
    assert shares["mean"] >= 0.93, shares


def test_features_come_from_the_last_but_one_layer_without_cls() -> None:
    _, model = load_model(FOLDER)
    assert model.config.vision_feature_layer == -2
    assert model.config.vision_feature_select_strategy == "default"
    with torch.no_grad():
        features = model.model.get_image_features(torch.zeros(1, 3, 168, 168)).pooler_output
    assert features[0].shape == (144, model.config.text_config.hidden_size)


def test_a_folder_without_a_model_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        load_model(tmp_path_factory.mktemp("empty"))
