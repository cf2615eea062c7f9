"""Methods of one's own from a module or a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import vtc
from vtc.errors import InputError, VTCError
from vtc.method.plugins import load_plugin
from vtc.method.registry import METHODS

CODE = '''
from dataclasses import dataclass
from typing import ClassVar
import vtc

@vtc.register
@dataclass(frozen=True)
class Unusual(vtc.ScoringCompressor):
    """Keep the tokens farthest from the mean [of all]."""

    power: float = 1.0
    name: ClassVar[str] = "unusual"

    def score(self, view):
        mean = view.tokens.mean(1, keepdim=True)
        return (view.tokens - mean).norm(dim=-1) ** self.power
'''


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "mine.py"
    file.write_text(CODE)
    yield file
    if "unusual" in vtc.list_methods():
        METHODS.unregister("unusual")


def test_a_file_registers_its_methods_and_may_be_named_again(plugin: Path) -> None:
    assert load_plugin(str(plugin)) == ["unusual"]
    assert load_plugin(str(plugin)) == ["unusual"]
    assert vtc.create("unusual", power=2.0).name == "unusual"


def test_a_module_registers_its_methods(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.rename(plugin.with_name("vtc_own_methods.py"))
    monkeypatch.syspath_prepend(plugin.parent)
    assert load_plugin("vtc_own_methods") == ["unusual"]
    assert load_plugin("vtc.methods.random") == ["random"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("nothing_here", None, "'nothing_here' cannot be imported: ModuleNotFoundError"),
        ("none.py", None, r"none\.py' is no file"),
        ("json", None, "'json' registers no method; put @vtc.register"),
        ("broken.py", "x = ", "cannot be imported: SyntaxError"),
        ("late.py", CODE + "\nraise RuntimeError('late')", "cannot be imported: RuntimeError: late"),
        ("taken.py", CODE.replace('"unusual"', '"random"'), "'random' is taken"),
    ],
)
def test_what_cannot_be_loaded_is_refused(tmp_path: Path, name: str, content: str | None, words: str) -> None:
    known = vtc.list_methods()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(VTCError, match=words) as raised:
        load_plugin(str(tmp_path / name) if name.endswith(".py") else name)
    assert "\n" not in str(raised.value)
    assert vtc.list_methods() == known


def test_a_mended_file_can_be_loaded_after_a_failure(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(CODE + "\nraise RuntimeError")
    with pytest.raises(InputError):
        load_plugin(str(file))
    file.write_text(CODE)
    try:
        assert load_plugin(str(file)) == ["unusual"]
    finally:
        METHODS.unregister("unusual")
