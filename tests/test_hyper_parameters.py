"""Hyper-parameters and arguments of `vtc.compress`: whatever is given, it works or a VTCError says why not."""

from __future__ import annotations

import copy
import dataclasses
import fractions
import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtc
from vtc import adapters
from vtc.errors import BudgetError, InputError, UnknownName, UnsupportedModel, VTCError
from vtc.method import learned, weights
from vtc.method.base import Compressor, ModelSpec, ScoringCompressor, Selection, StageView
from vtc.method.composite import Composite, combine
from vtc.method.hyper_parameters import parse
from vtc.method.registry import METHODS
from vtc.method.text import pairs as read_pairs
from vtc.testing import snapshot, tiny_inputs, tiny_model

if TYPE_CHECKING:
    from somewhere_else import Unknown  # type: ignore[import-not-found]

SPECS = [spec for family in adapters.families().values() for spec in family.references]


class Unprintable:
    """As broken as an argument can be."""

    def __repr__(self) -> str:
        raise RuntimeError


NONSENSE: list[Any] = [
    None, True, False, -1, 0, 1, 2, 1.5, 3.0, 10**30, -(10**30), 10**400, 10**5000, float("nan"), float("inf"),
    -float("inf"), 1e308, 1e-320, 1j, fractions.Fraction(1, 3), fractions.Fraction(10**400),
    "", "x", "false", "none", "0.5", "a\0b", "~nobody/x", "x" * 300, "two\nlines", b"x",
    [], (), {}, set(), [1], (1, 2, 3), (1.5,), [1, "x"], ["x"], [None], [[1]], (True, True), range(3),
    (10**30,), {1: 2},
    np.float64(0.5), np.float32(0.25), np.int64(3), np.bool_(True), np.str_("item"), np.array(1), np.array([1, 2]),
    np.array(["a", "b"]), np.float64("nan"), torch.tensor(1), torch.tensor([1, 2]), torch.int64,
    object(), Unprintable(), int, len, vtc, Path("nowhere"), Path("no/where.safetensors"),
]  # fmt: skip
FIELDS = [(name, field.name) for name in vtc.list_methods() for field in dataclasses.fields(METHODS.get(name))]


def settled(name: str, **options: Any) -> Compressor | None:
    """The method of these options, None where they are refused; asserts that it is whole where they are not."""
    try:
        method = vtc.create(name, **options)
    except VTCError as error:
        assert_helps(error)
        return None
    same = vtc.create(name, **options)
    assert method == same and hash(method) == hash(same)
    assert eval(repr(method), {type(method).__name__: type(method)}) == method
    assert type(method.needs_budget) is bool
    assert json.loads(json.dumps(method.described(), allow_nan=False)) is not None
    for spec in SPECS:
        try:
            assert method.plan(spec).stages
        except VTCError as error:
            assert_helps(error)
    return method


def assert_helps(error: VTCError) -> None:
    message = str(error)
    assert "\n" not in message and " at 0x" not in message
    assert len(message) < 500
    assert not message.endswith((".", " "))


# --- every method
@pytest.mark.parametrize(("name", "field"), FIELDS, ids=".".join)
def test_nonsense_is_refused_or_works(name: str, field: str) -> None:
    for value in NONSENSE:
        settled(name, **{field: value})
    assert settled(name, **{field: object()}) is None, "no field escapes the check"


def likely(annotation: str) -> st.SearchStrategy[Any]:
    """Values of a field's kind, valid or not."""
    integer, number = st.integers(-2, 40), st.one_of(st.floats(-1.5, 1.5), st.integers(-1, 2))
    kinds: list[st.SearchStrategy[Any]] = [st.none()] if "None" in annotation else []
    if "bool" in annotation:
        kinds.append(st.booleans())
    if "tuple" in annotation:
        kinds.append(st.lists(st.one_of(integer, number), max_size=4))
    return st.one_of(*kinds, integer, number)


@settings(max_examples=30)
@given(st.data())
@pytest.mark.parametrize("name", vtc.list_methods())
def test_likely_values_together_are_refused_or_work(name: str, data: st.DataObject) -> None:
    fields = [field for field in dataclasses.fields(METHODS.get(name)) if field.name != "weights"]
    drawn = (
        data.draw(st.lists(st.sampled_from(fields), max_size=4, unique_by=lambda field: field.name)) if fields else []
    )
    settled(name, **{field.name: data.draw(likely(str(field.type)), label=field.name) for field in drawn})


@pytest.mark.parametrize("name", vtc.list_methods())
def test_defaults_are_of_the_type_they_say(name: str) -> None:
    method = vtc.create(name)
    for field in dataclasses.fields(method):
        assert repr(getattr(method, field.name)) == repr(field.default)


# --- kinds of fields
@dataclass(frozen=True)
class Base(Compressor):
    """A third-party method that checks nothing itself."""

    count: int = 3
    share: float = 0.5
    on: bool = True
    kind: Literal["left", "right"] | None = None
    layers: tuple[int, ...] | None = None
    grid: tuple[int, int] = (2, 3)
    mixed: tuple[int | float, ...] = (0.5,)
    either: int | tuple[int, ...] = 1
    label: str = "a"
    noted: Annotated[int, "how many"] = 1
    level: Literal[1, 2] = 1
    foreign: Unknown | None = None
    free: Any = None

    name: ClassVar[str] = "base"

    def select(self, view: StageView) -> Selection | None:
        return None


@dataclass(frozen=True)
class Child(Base):
    """Inherits fields and adds a check."""

    extra: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.extra < self.count - 3:
            raise VTCError("extra is too small")


@pytest.mark.parametrize(
    ("field", "given", "becomes"),
    [
        ("count", np.int64(4), 4),
        ("count", 4.0, 4),
        ("share", 1, 1.0),
        ("share", np.float32(0.25), 0.25),
        ("share", fractions.Fraction(1, 4), 0.25),
        ("on", np.bool_(False), False),
        ("kind", np.str_("left"), "left"),
        ("layers", [1, np.int32(2)], (1, 2)),
        ("layers", range(3), (0, 1, 2)),
        ("grid", [4, 5], (4, 5)),
        ("mixed", [1, 1.0, np.float64(0.5), np.int64(2)], (1, 1.0, 0.5, 2)),
        ("either", 5.0, 5),
        ("either", [5, 6], (5, 6)),
        ("noted", np.int8(7), 7),
        ("level", np.int64(2), 2),
        ("foreign", "anything", "anything"),
        ("free", [1], [1]),
    ],
)
@pytest.mark.parametrize("cls", [Base, Child])
def test_what_comes_out_is_plain_python(cls: type[Base], field: str, given: Any, becomes: Any) -> None:
    value = getattr(cls(**{field: given}), field)
    assert repr(value) == repr(becomes)


def test_equal_numbers_make_equal_methods() -> None:
    plain, numpy = Base(share=0.5, count=2), Base(share=np.float64(0.5), count=np.int64(2))
    assert (plain, hash(plain), json.dumps(plain.described())) == (numpy, hash(numpy), json.dumps(numpy.described()))


@pytest.mark.parametrize(
    ("field", "given", "message"),
    [
        ("count", "two", "count='two' of 'base' is not a whole number; write for example count=3"),
        ("count", True, "count=True of 'base' is not a whole number"),
        ("count", 2.5, "count=2.5 of 'base' is not a whole number"),
        ("count", 2**63, "does not fit into 64 bits; write for example count=3"),
        ("share", float("nan"), "share=nan of 'base' is not a finite number; write for example share=0.5"),
        ("share", float("inf"), "share=inf of 'base' is not a finite number"),
        ("share", False, "share=False of 'base' is not a finite number"),
        ("on", "false", "on='false' of 'base' is not True or False; write for example on=True"),
        ("on", 0, "on=0 of 'base' is not True or False"),
        ("kind", "lfet", r"unknown kind 'lfet'; did you mean 'left'\? Known kinds: left, right"),
        ("kind", 3, "unknown kind 3; Known kinds: left, right"),
        ("level", True, "unknown level True; Known levels: 1, 2"),
        ("layers", 3, r"layers=3 of 'base' is not a tuple of whole numbers or None; write for example layers=\(2,\)"),
        ("layers", "12", "layers='12' of 'base' is not a tuple of whole numbers or None"),
        ("grid", (1, 2, 3), r"grid=\(1, 2, 3\) of 'base' is not a tuple of 2 whole numbers; .* grid=\(2, 3\)"),
        ("mixed", ("x",), "is not a tuple of whole numbers or finite numbers"),
        ("either", None, "either=None of 'base' is not a whole number or a tuple of whole numbers; .* either=1"),
        ("label", 3, "label=3 of 'base' is not a string; write for example label='a'"),
        ("noted", "x", "noted='x' of 'base' is not a whole number"),
        ("count", torch.tensor([[1], [2]]), r"count=tensor\(\[\[1\], \[2\]\]\) of 'base' is not"),
        ("count", object(), r"count=object\(...\) of 'base' is not"),
        ("count", "x" * 999, r"count='x{76}\.\.\. of 'base' is not"),
    ],
)
def test_the_message_names_the_kind(field: str, given: Any, message: str) -> None:
    with pytest.raises(VTCError, match=message) as caught:
        Base(**{field: given})
    assert_helps(caught.value)


def test_a_subclass_adds_to_the_check() -> None:
    with pytest.raises(VTCError, match="extra='x' of 'base' is not a whole number"):
        Child(extra="x")  # type: ignore[arg-type]
    with pytest.raises(VTCError, match="extra is too small"):
        Child(count=np.int64(9))  # type: ignore[arg-type]


def test_copies_stay_equal() -> None:
    method = vtc.create("atp_training_free", layers=[1, 2], strides=[2])
    for copied in (copy.deepcopy(method), pickle.loads(pickle.dumps(method)), dataclasses.replace(method)):
        assert copied == method and hash(copied) == hash(method)
    with pytest.raises(VTCError, match=r"lambda_sample='x' of 'atp_training_free'"):
        dataclasses.replace(method, lambda_sample="x")  # type: ignore[arg-type]


def test_a_class_with_an_initialiser_of_its_own() -> None:
    @dataclass(frozen=True)
    class Own(Base):
        seen: list[int] = dataclasses.field(default_factory=list)

        def __init__(self, seen: list[int]) -> None:
            super().__init__()
            object.__setattr__(self, "seen", seen)

    assert Own([1]).seen == [1]


def test_names_of_a_function_are_left_alone() -> None:
    local = int | None

    @dataclass(frozen=True)
    class Local(Base):
        inside: local = None  # type: ignore[valid-type]

    assert Local(inside="x").inside == "x"
    with pytest.raises(VTCError, match="count='x'"):
        Local(count="x")  # type: ignore[arg-type]


def test_a_method_without_defaults() -> None:
    @dataclass(frozen=True)
    class Needing(ScoringCompressor):
        power: float
        name: ClassVar[str] = "needing"

        def score(self, view: StageView) -> torch.Tensor:
            return view.tokens.norm(dim=-1)

    vtc.register(Needing)
    try:
        with pytest.raises(
            VTCError, match=r"'needing' has no default for power; .* vtc.create\('needing', power=...\)"
        ):
            vtc.create("needing")
        assert vtc.create("needing", power=2).power == 2.0  # type: ignore[attr-defined]
    finally:
        METHODS.unregister("needing")


# --- the command line
def typed(method: str, *pairs: str) -> dict[str, Any]:
    return read_pairs(list(pairs), "--set", method)


@pytest.mark.parametrize(
    ("method", "pair", "value"),
    [
        ("cdpruner", "inverse=false", False),
        ("cdpruner", "inverse=TRUE", True),
        ("cdpruner", "theta=none", None),
        ("cdpruner", "theta=null", None),
        ("cdpruner", "theta=0.5", 0.5),
        ("cdpruner", "scope=item", "item"),
        ("atp", "score_norm=none", "none"),  # an option of that name
        ("atp", "layers=[1, 2]", (1, 2)),
        ("atp", "layers=1,2", (1, 2)),
        ("atp", "weights=true", "true"),
        ("atp", "weights=123", "123"),
        ("atp", "weights=a=b", "a=b"),
        ("tome", "r=8", 8),
        ("random", "seed=0x10", 16),
    ],
)
def test_words_are_read_as_the_field_says(method: str, pair: str, value: Any) -> None:
    ((_, read),) = typed(method, pair).items()
    assert repr(read) == repr(value)


@pytest.mark.parametrize(
    ("method", "pairs", "message"),
    [
        ("vtc_cls", ["layers=two"], "layers='two' of 'vtc_cls' is not a whole number; write for example layers=3"),
        ("cdpruner", ["inverse=no"], "inverse='no' of 'cdpruner' is not True or False"),
        ("random", ["seed=((("], r"seed='\(\(\(' of 'random' is not a whole number"),
        ("random", ["seed={[]: 1}"], "seed='{.*' of 'random' is not a whole number"),
        ("random", ["seed=" + "9" * 5000], "seed=.* of 'random'"),
        ("random", ["sed=1"], "unknown hyper-parameter of 'random' 'sed'; did you mean 'seed'"),
        ("random", ["seed=1", "scope=item", "seed=2"], "--set: seed is given twice; write it once"),
        ("random", ["seed"], "--set: 'seed' is no name=value pair"),
        ("randm", ["seed=1"], "unknown method 'randm'"),
    ],
)
def test_pairs_that_are_refused(method: str, pairs: list[str], message: str) -> None:
    with pytest.raises(VTCError, match=message):
        vtc.create(method, **typed(method, *pairs))


def test_text_that_no_field_takes_comes_back() -> None:
    assert parse(Base, "count", "[1]") == [1]
    assert parse(Base, "absent", "none") is None
    assert parse(Base, "level", "2") == 2


# --- arguments of vtc.compress
class Pipeline:
    """Holds a model, as pipelines do."""

    def __init__(self, model: Any) -> None:
        self.model = model


class Processor:
    """Has a tokenizer and no model."""


def test_refused_calls_leave_nothing(clip: Any) -> None:
    """Every argument with every nonsense value: accepted, or one VTCError and a clean model."""
    with torch.no_grad():
        clip(**tiny_inputs("llava-clip", [[3, "image", 5]]))
    before = snapshot(clip)

    def calls() -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        for value in NONSENSE:
            yield (clip, value), {"retention": 0.5}
            yield (value, "vtc_cls"), {"retention": 0.5}
            yield (clip, [value, "vtc_cls"]), {"retention": 0.5}
            yield (clip, ["vtc_cls"]), {"retention": [value]}
            for name in ("retention", "keep"):
                yield (clip, "vtc_cls"), {name: value}
                yield (clip, ["vtc_cls", "fastv"]), {name: value}
                yield (clip, ["vtc_cls", "fastv"]), {name: [value, 0.9]}
            for name in ("positions", "pad_output", "trace", "prompt_length", "system_length", "layers", "nothing"):
                yield (clip, "vtc_cls"), {"retention": 0.5, name: value}

    accepted = 0
    for arguments, options in calls():
        try:
            handle = vtc.compress(*arguments, **options)
        except VTCError as error:
            assert_helps(error)
        else:
            accepted += 1
            handle.detach()
        assert snapshot(clip) == before
    assert accepted > 20


MODEL = tiny_model("llava-clip")
ARGUMENTS: list[tuple[type[VTCError], str, Any]] = [
    (UnknownName, r"unknown hyper-parameter of 'vtc_cls' 'retension'; did you mean 'retention'.* Known ",
     lambda: vtc.compress(MODEL, "vtc_cls", retension=0.3)),
    (UnknownName, "'layer'; did you mean 'layers'", lambda: vtc.compress(MODEL, "vtc_cls", retention=0.3, layer=2)),
    (UnknownName, "unknown argument 'position'; did you mean 'positions'",
     lambda: vtc.compress(MODEL, vtc.create("vtc_cls"), retention=0.3, position="compact")),
    (UnknownName, "unknown argument 'pad_outputs'; did you mean 'pad_output'",
     lambda: vtc.compress(MODEL, ["vtc_cls"], retention=0.3, pad_outputs=True)),
    (VTCError, "pad_output='false' of 'compress' is not True or False; write for example pad_output=True",
     lambda: vtc.compress(MODEL, "vtc_cls", retention=0.3, pad_output="false")),  # type: ignore[arg-type]
    (VTCError, "trace=0 of 'compress' is not True or False",
     lambda: vtc.compress(MODEL, "vtc_cls", retention=0.3, trace=0)),  # type: ignore[arg-type]
    (UnknownName, "unknown positions 'compat'; did you mean 'compact'",
     lambda: vtc.compress(MODEL, "vtc_cls", retention=0.3, positions="compat")),  # type: ignore[arg-type]
    (VTCError, r"method=VTCCLS is neither a registered name nor a Compressor object; .* or VTCCLS\(\)",
     lambda: vtc.compress(MODEL, METHODS.get("vtc_cls"), retention=0.3)),  # type: ignore[arg-type]
    (VTCError, r"'vtc_cls' stands where the model belongs .* write vtc.compress\(model, 'vtc_cls', ...\)",
     lambda: vtc.compress("vtc_cls", MODEL, retention=0.3)),  # type: ignore[arg-type]
    (UnsupportedModel, r"LlavaFor\w+ is a class, no model; load one with LlavaFor\w+.from_pretrained\(...\)",
     lambda: vtc.compress(type(MODEL), "vtc_cls", retention=0.3)),
    (UnsupportedModel, r"Pipeline\(...\) is a Pipeline, no model; pass its .model",
     lambda: vtc.compress(Pipeline(MODEL), "vtc_cls", retention=0.3)),  # type: ignore[arg-type]
    (UnsupportedModel, r"Processor\(...\) is a Processor, no model; pass what from_pretrained",
     lambda: vtc.compress(Processor(), "vtc_cls", retention=0.3)),  # type: ignore[arg-type]
    (UnsupportedModel, "the weights of this LlavaForConditionalGeneration are on the meta device",
     lambda: vtc.compress(copy.deepcopy(MODEL).to("meta"), "vtc_cls", retention=0.3)),
    (UnsupportedModel, "'x' is a str, no model", lambda: vtc.share_encoder("x")),  # type: ignore[arg-type]
    (VTCError, r"methods='vtc_cls' holds 'vtc_cls', no method; write \[vtc.create\('vtc_cls'\)\]",
     lambda: vtc.share_encoder(MODEL, "vtc_cls")),  # type: ignore[arg-type]
    (BudgetError, r"retention='0.5' is outside \(0, 1\]",
     lambda: vtc.compress(MODEL, ["vtc_cls"], retention="0.5")),  # type: ignore[arg-type]
    (BudgetError, r"retention=True is outside \(0, 1\]",
     lambda: vtc.compress(MODEL, ["vtc_cls", "fastv"], retention=[0.5, True])),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "call"), ARGUMENTS, ids=[message[:40] for _, message, _ in ARGUMENTS])
def test_refused_arguments(error: type[VTCError], message: str, call: Any) -> None:
    before = snapshot(MODEL)
    with pytest.raises(VTCError, match=message) as caught:
        call()
    assert type(caught.value) is error
    assert_helps(caught.value)
    assert snapshot(MODEL) == before


def test_numbers_of_numpy_are_numbers(clip: Any) -> None:
    with vtc.compress(clip, "vtc_cls", retention=np.float64(0.25), layers=np.int64(2), trace=np.bool_(True)) as handle:  # type: ignore[arg-type]
        assert repr(handle.budget) == "Budget(retention=0.25, keep=None)"
        assert handle.method == vtc.create("vtc_cls", layers=2)
    with vtc.compress(clip, ["vtc_cls", "fastv"], keep=[np.int64(4), np.int16(12)]) as handle:  # type: ignore[list-item]
        assert repr(handle.method).count("keep=4") == repr(handle.method).count("keep=12") == 1


# --- several methods
def test_a_composite_of_nonsense_is_refused() -> None:
    part, own = vtc.create("vtc_cls"), vtc.Budget(keep=3)
    for value in NONSENSE:
        for parts, budgets in ((value, (own,)), ((value,), (own,)), ((part,), value), ((part,), (value,))):
            with pytest.raises(VTCError) as caught:
                Composite(parts, budgets)
            assert_helps(caught.value)
        if value is not None:
            with pytest.raises(BudgetError):
                combine([part, part], value, None)
    with pytest.raises(VTCError, match="do not fit 1 methods; write one"):
        Composite((part,), (None,))
    assert Composite([part], [own]) == Composite((part,), (own,))  # type: ignore[arg-type]


# --- learned methods
SPEC = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32, width=8)


@pytest.mark.parametrize("name", ["atp", "quecc", "vqtoken"])
def test_weights_of_any_kind(name: str) -> None:
    for value in NONSENSE:
        for training in (False, True):
            try:
                vtc.create(name, weights=value, training=training)
            except VTCError as error:
                assert_helps(error)
            else:
                assert value is None
    for value in NONSENSE:
        with pytest.raises(VTCError):
            learned.load(value)


def test_weights_as_a_path(tmp_path: Path) -> None:
    method = vtc.create("atp", training=True, layers=[1, 2])
    path = method.save(tmp_path / "a.safetensors", method.module(SPEC), SPEC)  # type: ignore[attr-defined]
    found = vtc.create("atp", weights=path)
    assert found == vtc.create("atp", weights=str(path))
    assert found.layers == (1, 2)  # type: ignore[attr-defined]
    assert json.dumps(found.described()) == json.dumps(vtc.create("atp", weights=str(path)).described())
    assert found.module(SPEC) is not None
    assert learned.load(path) == found


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ("{", "the hyper-parameters in the weights '.*' cannot be read"),
        ("[1]", "cannot be read"),
        ('{"depth": 3}', "were trained with depth, which 'atp' does not have; they belong to another version"),
        ('{"bins": "many"}', "bins='many' of 'atp' is not a whole number"),
    ],
)
def test_stored_hyper_parameters_that_do_not_fit(tmp_path: Path, stored: str, message: str) -> None:
    path = tmp_path / "a.safetensors"
    weights.save(path, {"a": torch.ones(1)}, {"compressor": "atp", "hyper_parameters": stored})
    for load in (lambda: vtc.create("atp", weights=path), lambda: learned.load(path)):
        with pytest.raises(VTCError, match=message):
            load()


def test_weights_of_a_method_that_learns_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    weights.save(path, {"a": torch.ones(1)}, {"compressor": "atp_training_free"})
    with pytest.raises(VTCError):
        learned.load(path)


# --- sweeps
def test_sweeps_refuse_what_methods_refuse() -> None:
    pytest.importorskip("lmms_eval")
    from vtc.eval.cells import make_methods
    from vtc.eval.spec import make_spec

    plain = [value for value in NONSENSE if value is None or isinstance(value, bool | int | float | str | list | dict)]
    for name, field in FIELDS:
        for value in plain:
            try:
                make_methods(make_spec({"methods": [{"name": name, field: value}]}))
            except VTCError as error:
                assert_helps(error)
    for value in (None, True, 3, 1.5, "", "x", [], {}, object()):
        for entry in ({"name": value}, {"name": "random", "seed": value}):
            try:
                make_methods(make_spec({"methods": [entry]}))
            except VTCError:
                continue


def test_a_sweep_names_the_hyper_parameter() -> None:
    pytest.importorskip("lmms_eval")
    from vtc.eval.cells import make_methods
    from vtc.eval.spec import make_spec

    with pytest.raises(VTCError, match="layers='two' of 'vtc_cls' is not a whole number"):
        make_methods(make_spec({"methods": [{"name": "vtc_cls", "layers": "two"}]}))


def test_pairs_of_methods_that_are_not_known_yet() -> None:
    assert read_pairs(["a=1", "b=none", "c=x"], "--set", "of a plugin") == {"a": 1, "b": None, "c": "x"}
    with pytest.raises(InputError):
        typed("random", "=1")
