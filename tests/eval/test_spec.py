"""What a sweep may be asked for, and what is refused with which words."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import typer

import vtc
from vtc.errors import BudgetError, InputError, VTCError
from vtc.eval.series import make_series
from vtc.eval.spec import CONFIGS, SweepSpec, make_spec, read_settings
from vtc.method.composite import combine


def test_the_default_file_says_what_the_defaults_are() -> None:
    spec = make_spec(read_settings(CONFIGS / "default.yaml"))
    assert spec.model_copy(update={"out": None}) == SweepSpec()
    assert spec.folder == SweepSpec().folder == Path("results/tiny-llava")


def test_the_default_file_spells_out_every_setting() -> None:
    assert set(read_settings(CONFIGS / "default.yaml")) == set(SweepSpec.model_fields)


def test_the_help_names_every_shipped_file() -> None:
    from vtc.cli.sweep import app

    (argument,) = [each for each in typer.main.get_command(app).params if each.name == "config"]
    assert ", ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml"))) in str(argument.help)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"keep": [True]}, "keep.0"),
        ({"keep": True}, "keep.0"),
        ({"retentions": [0.5, True]}, "retentions.1"),
        ({"limit": True}, "limit"),
        ({"batch_size": True}, "batch_size"),
        ({"seed": False}, "seed"),
        ({"workers": True}, "workers"),
        ({"gpus_per_worker": True}, "gpus_per_worker"),
        ({"video": {"frames": True}}, "video.frames"),
        ({"methods": [{"name": "random", "keep": True}]}, "methods.0.keep"),
        ({"methods": [{"name": "random", "retention": True}]}, "methods.0.retention"),
    ],
)
def test_true_is_no_number(settings: dict[str, Any], where: str) -> None:
    with pytest.raises(InputError, match=rf"^here: {where}: (true|false) is no number; "):
        make_spec(settings, source="here")


def test_every_shipped_file_is_valid_and_reached_by_its_name() -> None:
    for file in CONFIGS.glob("*.yaml"):
        assert make_series(read_settings(Path(file.stem))) == make_series(read_settings(file))


def test_methods_may_be_names_or_mappings() -> None:
    spec = make_spec({"methods": ["stride", {"name": "random", "seed": 1}]})
    assert [(m.name, m.parameters) for m in spec.methods] == [("stride", {}), ("random", {"seed": 1})]
    assert make_spec({"methods": "stride"}).methods[0].name == "stride"


def test_the_output_folder_is_named_after_the_file_or_the_model(tmp_path: Path) -> None:
    file = tmp_path / "night.yaml"
    file.write_text("limit: 3\n")
    assert make_spec(read_settings(file)).folder == Path("results/night")
    assert make_spec({"model": "org/model-7b"}).folder == Path("results/model-7b")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"retention": [0.5]}, "unknown key 'retention'; did you mean 'retentions'"),
        ({"zzzz": 1}, "unknown key 'zzzz'. Known keys: model, methods"),
        ({"methods": []}, "methods is empty"),
        ({"tasks": []}, "tasks is empty"),
        ({"retentions": ["much"]}, "retentions.0: input should be a valid number"),
        ({"methods": [{"seed": 1}]}, "methods.0.name: field required"),
        ({"limit": 0}, "limit: input should be greater than or equal to 1"),
        ({"batch_size": -1}, "batch_size: input should be greater than or equal to 1"),
        ({"positions": "squeeze"}, "positions: input should be 'preserve', 'compact' or 'compact_input'"),
    ],
)
def test_refused_settings_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=f"^here: {words}"):
        make_spec(settings, source="here")


@pytest.mark.parametrize("retention", [0.0, -0.5, 1.01, 25])
def test_a_retention_is_a_fraction(retention: float) -> None:
    with pytest.raises(BudgetError, match=r"the fraction of visual tokens kept, for example 0\.25"):
        make_spec({"retentions": [0.5, retention]})


@pytest.mark.parametrize(
    ("content", "words"),
    [("a: [", "not readable as YAML"), ("- 1", "expected 'key: value' lines"), ("1: 2", "expected")],
)
def test_a_file_that_is_not_a_mapping_is_refused(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(InputError, match=words):
        read_settings(file)


def test_a_missing_file_names_the_shipped_ones() -> None:
    with pytest.raises(InputError, match=r"no sweep file 'nope\.yaml'.*default, .*full, mini, parts, quick, ranking"):
        read_settings(Path("nope.yaml"))


def test_methods_may_be_text_lists_and_objects() -> None:
    written = make_spec({"methods": ["random(seed=1), hiprune@0.5+mustdrop(merge=off, filter=off)"]})
    mapped = make_spec(
        {
            "methods": [
                {"name": "random", "seed": 1},
                [{"name": "hiprune", "retention": 0.5}, {"name": "mustdrop", "merge": "off", "filter": "off"}],
            ]
        }
    )
    assert written == mapped
    assert [m.label for m in written.methods] == ["random(seed=1)", "hiprune@0.5+mustdrop(merge=off, filter=off)"]
    objects = make_spec({"methods": [vtc.create("random", seed=1)]}).methods[0]
    assert (objects.label, objects.compressor) == ("random(seed=1)", vtc.create("random", seed=1))


def test_a_spec_with_objects_and_combinations_survives_a_file() -> None:
    pair = combine([vtc.create("hiprune"), vtc.create("aim", merge=False)], [0.5, 0.6], None)
    spec = make_spec({"methods": [vtc.create("random", seed=1), pair]})
    again = make_spec(json.loads(json.dumps(spec.model_dump(mode="json"))))
    assert [m.label for m in again.methods] == ["random(seed=1)", "hiprune@0.5+aim(merge=False)@0.6"]
    assert again.methods[0].model_dump() == {"name": "random", "seed": 1}


@dataclass(frozen=True)
class Odd(vtc.ScoringCompressor):
    """Holds what no file can hold."""

    rule: Any = None

    name: ClassVar[str] = "odd"

    def score(self, view: vtc.StageView) -> Any:
        return view.tokens[..., 0]


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ([Odd(rule=print)], "'odd' has rule=<built-in function print>, which the files of a sweep cannot hold"),
        ([Odd], "Odd is a class; write Odd\\(\\)"),
        ("random(", "cannot be read"),
        ([{"name": "random", "retention": 2}], "retention=2.0 is outside"),
        ([[]], "methods.0.name: string should have at least 1 character"),
        (3, "3 is no list of methods"),
    ],
)
def test_methods_that_make_no_sense_are_refused(methods: Any, words: str) -> None:
    with pytest.raises(VTCError, match=words):
        make_spec({"methods": methods})


@pytest.mark.parametrize("setting", ["model", "out"])
def test_an_empty_name_is_refused(setting: str) -> None:
    with pytest.raises(InputError, match="is empty"):
        make_spec({setting: " "})


def test_a_name_too_long_for_a_folder_is_refused() -> None:
    with pytest.raises(InputError, match="a name of 300 bytes"):
        make_spec({"out": Path("results") / ("x" * 300)})
