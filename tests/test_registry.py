"""Names of methods: lookup, near matches, duplicates, third-party packages."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch

import vtc
import vtc.methods
from vtc.app.catalogue import describe_methods
from vtc.errors import UnknownName, VTCError
from vtc.method.base import Compressor, ScoringCompressor, Selection, StageView
from vtc.method.registry import METHODS, MethodRegistry
from vtc.testing import tiny_inputs

PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar
import vtc

@dataclass(frozen=True)
class LastTokens(vtc.ScoringCompressor):
    sign: float = 1.0
    name: ClassVar[str] = "last_tokens"

    def score(self, view):
        return self.sign * view.items.token.float()
"""


def make_package(folder: Path, entry_point: str, source: str = PLUGIN) -> None:
    """An installed distribution with one module and one entry point."""
    (folder / "vtc_plugin_of_tests.py").write_text(source)
    info = folder / "vtc_plugin_of_tests-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vtc-plugin-of-tests\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[vtc.methods]\n{entry_point}\n")


@pytest.fixture
def fresh_scan(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The global registry looks for packages again, and forgets what it found afterwards."""
    before = dict(METHODS._classes)
    monkeypatch.setattr(METHODS, "_scanned", False)
    yield
    METHODS._classes.clear()
    METHODS._classes.update(before)
    sys.modules.pop("vtc_plugin_of_tests", None)
    importlib.invalidate_caches()


@dataclass(frozen=True)
class Mine(ScoringCompressor):
    """Keeps the tokens with the largest norm."""

    power: float = 2.0

    name: ClassVar[str] = "mine"

    def score(self, view: StageView) -> torch.Tensor:
        return view.tokens.norm(dim=-1) ** self.power


# --- lookup
def test_every_module_of_the_package_registers_a_method() -> None:
    """One method, one file or folder; a learned method's training-free form lies in its folder under its own name."""
    modules = [module.name for module in pkgutil.iter_modules(vtc.methods.__path__)]
    assert vtc.list_methods() == sorted(vtc.list_methods())
    homes = {name: METHODS.get(name).__module__.split(".") for name in vtc.list_methods()}
    own = {name: home[2] for name, home in homes.items() if home[:2] == ["vtc", "methods"]}
    assert set(own.values()) == set(modules)
    assert {"vtc_cls", "random", "stride", "pool"} <= set(own)
    for name, module in own.items():
        assert name.startswith(module)


@pytest.mark.parametrize("name", vtc.list_methods())
def test_every_method_is_an_immutable_documented_value(name: str) -> None:
    cls = METHODS.get(name)
    method = vtc.create(name)
    assert type(method) is cls
    assert method == vtc.create(name)
    assert hash(method) == hash(vtc.create(name))
    assert eval(repr(method), {cls.__name__: cls}) == method
    assert cls.name == name == name.lower()
    assert isinstance(cls.version, int)
    assert cls.version >= 1
    assert cls.__doc__ is not None
    doc = " ".join(parent.__doc__ or "" for parent in cls.__mro__)
    for given in dataclasses.fields(cls):
        assert given.default is not dataclasses.MISSING, f"{name}.{given.name} has no default"
        assert given.name in doc, f"{name}.{given.name} is not described"
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, given.name, given.default)


def test_hyper_parameters_go_by_name() -> None:
    assert vtc.create("vtc_cls", layers=5) == dataclasses.replace(vtc.create("vtc_cls"), layers=5)
    with pytest.raises(UnknownName) as caught:
        vtc.create("vtc_cls", layer=5)
    assert str(caught.value).startswith("unknown hyper-parameter of 'vtc_cls' 'layer'; did you mean 'layers'")
    known = ", ".join(sorted(field.name for field in dataclasses.fields(vtc.create("vtc_cls"))))
    assert str(caught.value).endswith(f"Known hyper-parameters: {known}")
    with pytest.raises(UnknownName, match="Known hyper-parameters: none"):
        vtc.create("pool", anything=1)


@pytest.mark.parametrize(
    ("given", "near"), [("vtc-cls", "vtc_cls"), ("VTC_CLS", "vtc_cls"), ("randm", "random"), ("pooling", "pool")]
)
def test_near_matches(given: str, near: str) -> None:
    with pytest.raises(UnknownName, match=rf"unknown method '{given}'; did you mean .*'{near}'.*Known methods: "):
        vtc.create(given)


def test_names_without_near_matches_get_the_list(clip: Any) -> None:
    with pytest.raises(UnknownName) as caught:
        vtc.compress(clip, "xyzzy", retention=0.5)
    names = vtc.list_methods()
    shown, _, rest = str(caught.value).removeprefix("unknown method 'xyzzy'; Known methods: ").partition(", ... ")
    assert names[: len(shown.split(", "))] == shown.split(", ") and rest == f"({len(names)} in all)"


# --- filters
def test_methods_by_pattern_stage_training_and_family() -> None:
    names = vtc.list_methods()
    assert vtc.list_methods("vq*") == ["vqtoken", "vqtoken_codebook"]
    assert vtc.list_methods("random") == ["random"]
    assert {*vtc.list_methods("*", trained=True)} | {*vtc.list_methods(trained=False)} == {*names}
    assert vtc.list_methods(trained=True) == [name for name in names if METHODS.get(name).trained] != []
    assert {"mustdrop", "snapkv", "streaming_kv"} <= {*vtc.list_methods(stage="cache")}
    assert {"fastv", "pyramiddrop", "atp"} <= {*vtc.list_methods(stage="llm")}
    assert {"random", "pool"} <= {*vtc.list_methods(stage="pre_llm")}
    assert "random" not in vtc.list_methods(stage="llm")
    assert "mustdrop" in vtc.list_methods(stage="encoder", family="llava")
    assert "mustdrop" not in vtc.list_methods(
        stage="encoder", family="qwen2.5-vl"
    )  # there it merges in front of the LLM
    assert {*vtc.list_methods(stage="encoder", family="llava")} <= {*vtc.list_methods(stage="encoder")}
    assert vtc.list_methods("a*", trained=True, stage="cache") == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pattern": "vqtokn"}, r"unknown method 'vqtokn'; did you mean 'vqtoken'"),
        ({"pattern": "zz*"}, r"unknown method 'zz\*'; Known methods: aim, .*in all"),
        ({"pattern": 3}, r"unknown method 3; Known methods"),
        (
            {"stage": "pre-llm"},
            r"unknown stage 'pre-llm'; did you mean 'pre_llm'.* Known stages: cache, encoder, llm, pre",
        ),
        ({"stage": 0}, r"unknown stage 0; Known stages"),
        ({"family": "lava"}, r"unknown family 'lava'; did you mean 'llava'.* Known families: internvl, llava"),
        ({"family": ["llava"]}, r"unknown family \['llava'\]"),
        ({"trained": "yes"}, r"trained='yes' is neither True nor False; leave it out"),
    ],
)
def test_filters_that_select_nothing(given: dict[str, Any], message: str) -> None:
    with pytest.raises(VTCError, match=message):
        vtc.list_methods(**given)


def test_a_method_without_defaults_is_listed_all_the_same(fresh_scan: None) -> None:
    @vtc.register
    class Demanding(Mine):
        name: ClassVar[str] = "demanding"
        level: int = field(kw_only=True)

    (entry,) = describe_methods(vtc.list_methods("demanding"))
    assert (entry["stages"], entry["families"], entry["hyper_parameters"]["level"]) == ([], [], None)
    assert vtc.list_methods("demanding", family="llava") == []


# --- registration
def test_registration_by_hand(clip: Any, fresh_scan: None) -> None:
    assert vtc.register(Mine) is Mine
    assert vtc.register(Mine) is Mine  # the same class again is no conflict
    assert "mine" in vtc.list_methods()
    with vtc.compress(clip, "mine", retention=0.25, power=1.0) as handle, torch.no_grad():
        clip(**tiny_inputs("llava-clip", [[3, "image", 5]]))
    assert handle.method == Mine(power=1.0)
    assert handle.stats.visual_tokens_kept == 4
    METHODS.unregister("mine")
    assert "mine" not in vtc.list_methods()


def test_a_name_is_given_once(fresh_scan: None) -> None:
    class Random(Mine):
        name: ClassVar[str] = "random"

    taken = r"method name 'random' is taken by vtc\.methods\.random\.Random; choose another"
    vtc.list_methods()
    with pytest.raises(VTCError, match=taken):
        vtc.register(dataclass(frozen=True)(Random))


def test_registration_makes_the_dataclass() -> None:
    registry = MethodRegistry()

    @registry.register
    class TopNorm2(ScoringCompressor):
        power: float = 2.0
        layers: Sequence[int] = (2, 6)
        order: Literal["up", "down"] = "up"

        def score(self, view: StageView) -> torch.Tensor:
            return view.tokens.norm(dim=-1) ** self.power

    assert TopNorm2.name == "top_norm2"
    assert registry.parameters("top_norm2") == ["scope", "power", "layers", "order"]
    method = registry.create("top_norm2", power=3, layers=[1, 2])
    assert dataclasses.asdict(method) == {"scope": "item", "power": 3.0, "layers": (1, 2), "order": "up"}
    assert hash(method) == hash(TopNorm2(3.0, (1, 2)))  # type: ignore[call-arg]
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.power = 1.0  # type: ignore[attr-defined]
    with pytest.raises(UnknownName, match="unknown order 'upp'; did you mean 'up'"):
        registry.create("top_norm2", order="upp")
    with pytest.raises(VTCError, match=r"layers=3 of 'top_norm2' is not a tuple of whole numbers; write .*\(2, 6\)"):
        registry.create("top_norm2", layers=3)


def test_a_dataclass_stays_as_it_was_written() -> None:
    @MethodRegistry().register
    @dataclass(frozen=True, kw_only=True)
    class Careful(Mine):
        name: ClassVar[str] = "careful"
        level: int = field(default=1, metadata={"unit": "tokens"}, compare=False)

    assert Careful(level=2) == Careful(level=3)
    assert dataclasses.fields(Careful)[-1].metadata == {"unit": "tokens"}
    with pytest.raises(TypeError):
        Careful(1.0, 2)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"layers": (list, [1, 2])}, "mutable default"),
        ({"first": (int, 1), "second": (int,)}, "non-default argument 'second' follows default argument"),
    ],
)
def test_fields_that_make_no_dataclass(fields: dict[str, Any], reason: str) -> None:
    body = {name: default[0] for name, (_, *default) in fields.items() if default}
    annotations = {name: kind for name, (kind, *_) in fields.items()}
    odd = type("Odd", (Mine,), {**body, "__annotations__": annotations, "name": "odd"})
    with pytest.raises(VTCError, match=rf"Odd cannot become a dataclass: .*{reason}.*; write its hyper-parameters as"):
        MethodRegistry().register(odd)


@pytest.mark.parametrize("given", [3, None, ["random"], {}, b"random", Mine])
def test_names_that_are_no_text(given: Any) -> None:
    with pytest.raises(UnknownName, match=r"unknown method .*Known methods: aim, .* in all"):
        vtc.create(given)
    with pytest.raises(UnknownName):
        MethodRegistry().unregister(given)


def named(given: Any) -> Any:
    return dataclass(frozen=True)(type("Named", (Mine,), {"name": given}))


@pytest.mark.parametrize("given", [None, 3, "", " ", "a b", "a,b", "a/b", "a(b)", "-a", "two\nlines"])
def test_names_that_nobody_could_write(given: Any) -> None:
    with pytest.raises(VTCError, match=r"Named has name=.*; write a class variable such as name: ClassVar\[str\] = "):
        MethodRegistry().register(named(given))


@pytest.mark.parametrize("given", ["my-method", "a.b", "méthode", "v2"])
def test_other_names_are_free(given: str) -> None:
    registry, cls = MethodRegistry(), named(given)
    assert registry.create(registry.register(cls).name) == cls()


def test_names_come_from_the_class_unless_they_are_written() -> None:
    class Nameless(Compressor):
        def select(self, view: StageView) -> Selection | None:
            return None

    class NamelessToo(Nameless): ...

    class Written(Nameless):
        name = "mine"

    class Inherited(Written): ...

    assert [Nameless.name, NamelessToo.name, Nameless().name] == ["nameless", "nameless_too", "nameless"]
    assert [Written.name, Inherited.name] == ["mine", "mine"]
    assert MethodRegistry().register(NamelessToo).name == "nameless_too"


@pytest.mark.parametrize("given", [3, "random", None, vtc.create("random"), int, lambda: None])
def test_what_is_no_class_of_methods(given: Any) -> None:
    with pytest.raises(VTCError, match=r"is no class of methods; derive one from vtc\.Compressor"):
        MethodRegistry().register(given)


def test_an_abstract_class() -> None:
    @dataclass(frozen=True)
    class Unfinished(ScoringCompressor):
        name: ClassVar[str] = "unfinished"

    with pytest.raises(VTCError, match="Unfinished is abstract; write its score"):
        MethodRegistry().register(Unfinished)


# --- third-party packages
def test_a_package_adds_its_method(
    clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_scan: None
) -> None:
    make_package(tmp_path, "last = vtc_plugin_of_tests:LastTokens")
    monkeypatch.syspath_prepend(tmp_path)
    assert "last_tokens" in vtc.list_methods()
    with vtc.compress(clip, "last_tokens", keep=3) as handle, torch.no_grad():
        clip(**tiny_inputs("llava-clip", [[3, "image", 5]]))
    assert handle.trace[0].items[0].kept[0].tolist() == [13, 14, 15]
    with vtc.compress(clip, "last_tokens", keep=3, sign=-1.0) as handle, torch.no_grad():
        clip(**tiny_inputs("llava-clip", [[3, "image", 5]]))
    assert handle.trace[0].items[0].kept[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("entry_point", "source", "reason"),
    [
        ("last = vtc_plugin_of_tests:Missing", PLUGIN, "Missing"),
        ("last = vtc_plugin_of_tests:LastTokens", "import does_not_exist", "does_not_exist"),
        ("last = vtc_plugin_of_tests:LastTokens", PLUGIN.replace("last_tokens", "random"), "is taken by"),
        ("last = vtc_plugin_of_tests:vtc", PLUGIN, "vtc"),
    ],
    ids=["no such class", "import fails", "name taken", "no class"],
)
def test_a_broken_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_scan: None, entry_point: str, source: str, reason: str
) -> None:
    make_package(tmp_path, entry_point, source)
    monkeypatch.syspath_prepend(tmp_path)
    target = entry_point.split(" = ")[1]
    for _ in range(2):  # a second look must not pass over it
        with pytest.raises(VTCError) as caught:
            vtc.list_methods()
        message = str(caught.value)
        assert f"the entry point '{target}' of group 'vtc.methods' cannot be loaded" in message
        assert reason in message
        assert message.endswith("fix or uninstall the package that provides it")


def test_the_scan_waits_until_a_name_is_needed() -> None:
    code = "import sys, vtc; assert 'vtc.methods.random' not in sys.modules; vtc.list_methods(); " + (
        "assert 'vtc.methods.random' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
