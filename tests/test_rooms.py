"""Rooms: every package of the library has one purpose, and imports only from the rooms below it."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

from vtc.method.registry import METHODS

ROOT = Path(__file__).parents[1]
ROOMS = ("errors", "ops", "embedded", "cost", "method", "methods", "batch", "adapters", "engine", "app", "eval", "cli")
"""From the ground up. `vtc.testing` stands beside the stairs: it may use everything below `eval`."""
BESIDE = {"testing": set(ROOMS) - {"eval", "cli"}}
CLOSED = {
    "cost": {"errors"},
    "ops": {"errors"},
    "methods": {"errors", "ops", "embedded", "method"},
    "method": {"errors", "ops", "embedded"},
}
"""Rooms that may use less than all below them."""
FLAT = {"__init__", "__main__", "errors"}


def files() -> Iterator[tuple[str, Path]]:
    """Every module of the library by its full name."""
    for folder in ("vtc", "adapters", "eval"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join((*(() if folder == "vtc" else ("vtc",)), *parts)).removesuffix(".__init__"), path


FILES = dict(files())


def room(module: str) -> str | None:
    """The room a module of the library lies in; None for what is flat in `vtc`, and for the package itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "vtc" and len(parts) > 1 and parts[1] not in FLAT - {"errors"} else None


@functools.cache
def parse(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text())


def checks_types(node: ast.AST) -> bool:
    """True for what only type checkers read."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(path: Path) -> Iterator[tuple[ast.Import | ast.ImportFrom, str, str]]:
    """Import statements with each module of the library they name, and the name taken from it, if any."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name, "") for alias in node.names if alias.name.startswith("vtc"))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vtc":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield node, whole if whole in FILES else node.module, "" if whole in FILES else alias.name


def allowed(name: str) -> set[str]:
    """Rooms that a room may import from."""
    below = BESIDE.get(name) or CLOSED.get(name) or set(ROOMS[: ROOMS.index(name)])
    return below | {name}


def test_everything_lies_in_a_room() -> None:
    flat = {path.stem for path in (ROOT / "vtc").glob("*.py")}
    assert flat == FLAT
    folders = {path.name for path in (ROOT / "vtc").iterdir() if (path / "__init__.py").exists()}
    assert folders | {"errors", "adapters", "eval"} == {*ROOMS, *BESIDE}


def test_arrows_point_down() -> None:
    wrong = [
        f"{module}:{node.lineno} imports {target}"
        for module, path in FILES.items()
        if (home := room(module)) is not None  # the package's own names come from everywhere
        for node, target, _ in imports(path)
        if (there := room(target)) is not None and there not in allowed(home)
    ]
    assert wrong == []


def test_no_private_name_crosses_a_wall() -> None:
    wrong = []
    for module, path in FILES.items():
        for node, target, name in imports(path):
            private = name.startswith("_") or any(part.startswith("_") for part in target.split(".")[2:])
            if private and room(target) != room(module):
                wrong.append(f"{module}:{node.lineno} {name} of {target}")
    assert wrong == []


def test_late_imports_say_why() -> None:
    """In a function; the reason stands on the line, or above the first of several. For commands: `vtc.cli` says it."""
    wrong = []
    for module, path in FILES.items():
        lines = path.read_text().splitlines()
        typing = {id(each) for block in ast.walk(parse(path)) if checks_types(block) for each in ast.walk(block)}
        late = [node for node, _, _ in imports(path) if node.col_offset > 0 and id(node) not in typing]
        if room(module) in (None, "cli"):
            continue
        numbers = {line for node in late for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
        for number in sorted(numbers):
            first = number
            while first - 1 in numbers:
                first -= 1
            block = [lines[first - 2].strip(), *(lines[n - 1] for n in range(first, number + 1))]
            if not block[0].startswith("#") and not any("#" in line for line in block[1:]):
                wrong.append(f"{module}:{number} {lines[number - 1].strip()}")
    assert wrong == []


def test_the_library_keeps_clear_of_what_it_does_not_need() -> None:
    """Methods and the mathematics know no model; only `eval` and the commands know the harness."""
    for module, path in FILES.items():
        nodes = list(ast.walk(parse(path)))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        roots = {name.split(".")[0] for name in names}
        if room(module) in ("ops", "cost", "method", "methods", "batch"):
            assert "transformers" not in roots, module
        if room(module) not in ("eval", "cli"):
            assert not roots & {"lmms_eval", "datasets", "matplotlib", "pandas"}, module


NAMED = {
    ("cli/train.py", "atp_training_free"),  # the default of an option
    ("testing/graphs.py", "vtc_cls"),  # one stands for all
    ("testing/dispatch.py", "scope"),  # the hyper-parameter
}


def test_shared_code_names_no_method() -> None:
    """Words of the language that are names too left out; released forms are those of one method each."""
    methods, found = set(METHODS.names()) - {"pool", "random", "stride"}, set()
    for path in sorted((ROOT / "vtc").rglob("*.py")):
        place = path.relative_to(ROOT / "vtc")
        if place.parts[0] == "methods" or place.parts[:2] == ("testing", "released"):
            continue
        texts = [node.value for node in ast.walk(parse(path)) if isinstance(node, ast.Constant)]
        names = {text.split(" (")[0] for text in texts if isinstance(text, str)}
        found |= {(place.as_posix(), name) for name in names & methods}
    assert found <= NAMED
