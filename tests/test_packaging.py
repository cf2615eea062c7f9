"""The three packages are one product: where they come from, what a wheel holds, what an import costs."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vtc
import vtc.adapters
import vtc.eval
import vtc.testing

ROOT = Path(__file__).parents[1]
FOLDERS = {"vtc": ROOT / "vtc", "vtc.adapters": ROOT / "adapters", "vtc.eval": ROOT / "eval"}
DISTRIBUTION = "visual-token-compression"
HEAVY = {"lmms_eval", "datasets", "av", "pandas", "pyarrow", "matplotlib", "scipy", "sklearn", "statsmodels", "ray"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def sources(package: str) -> Iterator[tuple[str, Path]]:
    """(module name, file) of every module of one of the three packages."""
    for file in sorted(FOLDERS[package].rglob("*.py")):
        parts = file.relative_to(FOLDERS[package]).with_suffix("").parts
        yield ".".join([package, *(part for part in parts if part != "__init__")]), file


def imports(file: Path, *, everywhere: bool = True) -> set[str]:
    """Absolute names a module imports; everywhere=False: only those that importing it runs."""
    tree = ast.parse(file.read_text())
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if not everywhere and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} imports relatively"
            found.update({node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def under(names: set[str], *packages: str) -> set[str]:
    return {name for name in names for package in packages if name == package or name.startswith(f"{package}.")}


# --- one place
def test_the_packages_come_from_one_place() -> None:
    home = Path(vtc.__file__).parent
    for package in (vtc.adapters, vtc.eval):
        assert Path(package.__file__ or "").parent.parent in (home.parent, home)
    if home.parent == ROOT:
        assert [Path(m.__file__ or "").parent for m in (vtc, vtc.adapters, vtc.eval)] == list(FOLDERS.values())


def test_every_package_is_listed(project: dict[str, Any]) -> None:
    settings = project["tool"]["setuptools"]
    found = {
        ".".join([package, *init.parent.relative_to(folder).parts])
        for package, folder in FOLDERS.items()
        for init in folder.rglob("__init__.py")
    }
    assert sorted(settings["packages"]) == sorted(found)
    assert {k: ROOT / v for k, v in settings["package-dir"].items()} == FOLDERS


def test_every_file_beside_the_code_is_shipped(project: dict[str, Any]) -> None:
    patterns = project["tool"]["setuptools"]["package-data"]
    shipped: set[Path] = set()
    for package, globs in patterns.items():
        base = next(name for name in sorted(FOLDERS, key=len, reverse=True) if f"{package}.".startswith(f"{name}."))
        folder = (
            FOLDERS[base].joinpath(*package.removeprefix(base).strip(".").split("."))
            if package != base
            else (FOLDERS[base])
        )
        shipped |= {file for pattern in globs for file in folder.glob(pattern) if file.is_file()}
    present = {
        file
        for folder in FOLDERS.values()
        for file in folder.rglob("*")
        if file.is_file() and file.suffix != ".py" and "__pycache__" not in file.parts
    }
    assert sorted(present - shipped) == []
    assert ROOT / "vtc" / "py.typed" in shipped


def test_the_version_is_written_once_and_matches(project: dict[str, Any]) -> None:
    assert vtc.__version__ == project["project"]["version"] == importlib.metadata.version(DISTRIBUTION)


def test_the_distribution_is_not_somebody_elses(project: dict[str, Any]) -> None:
    """The package index has a `vtc` that is another project: what is installed and recorded bears a name of its own."""
    from vtc.eval.versions import versions

    assert project["project"]["name"] == DISTRIBUTION
    assert versions()[DISTRIBUTION] == vtc.__version__
    assert DISTRIBUTION in importlib.metadata.packages_distributions()["vtc"]


@pytest.mark.parametrize("folder", [*FOLDERS.values(), ROOT / "tests", ROOT / "docs", ROOT / "notebooks"])
def test_nobody_is_told_to_install_another_project(folder: Path) -> None:
    told = re.compile(r"install(?!-)[^\n]*[ '\"`]vtc\b(?!\.)")
    files = [file for file in folder.rglob("*") if file.suffix in (".py", ".md", ".ipynb", ".html", ".yaml")]
    files += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile")]
    wrong = [f"{file.name}: {line}" for file in files for line in file.read_text().splitlines() if told.search(line)]
    assert wrong == []


def test_entry_points_can_be_loaded(project: dict[str, Any]) -> None:
    points = importlib.metadata.distribution(DISTRIBUTION).entry_points
    wanted = {("console_scripts", name, value) for name, value in project["project"]["scripts"].items()}
    for group, entries in project["project"]["entry-points"].items():
        wanted |= {(group, name, value) for name, value in entries.items()}
    assert {(point.group, point.name, point.value) for point in points} == wanted
    assert all(callable(point.load()) for point in points.select(group="console_scripts"))


# --- public names
@pytest.mark.parametrize("name", ["vtc", "vtc.testing"])
def test_all_equals_the_public_names(name: str) -> None:
    module = importlib.import_module(name)
    public = {
        key
        for key, value in vars(module).items()
        if not key.startswith("_") and not isinstance(value, types.ModuleType) and key != "annotations"
    }
    later = {name for name, place in getattr(module, "_LATER", {}).items() if ":" in place}
    assert sorted(module.__all__) == sorted(public | later)
    assert len(set(module.__all__)) == len(module.__all__)


def test_public_names_say_what_they_are() -> None:
    for name in vtc.__all__:
        value = getattr(vtc, name)
        if isinstance(value, type | types.FunctionType | types.MethodType):
            assert (value.__doc__ or "").strip(), name


# --- dependencies
def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements: list[str]) -> set[str]:
    return {normal(re.split(r"[\s<>=!~\[;]", each)[0]) for each in requirements}


def distributions(names: set[str]) -> set[str]:
    """Distributions that provide the top-level modules among `names`, without the standard library and vtc."""
    providers = importlib.metadata.packages_distributions()
    top = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"vtc", ""}
    return {normal(min(providers.get(name, [f"nothing provides {name}"]))) for name in top}


LATE = {
    "vtc.adapters.pairs": {"open_clip"},
    "vtc.app.decoders": {"av"},
    "vtc.app.explore": {"ipywidgets"},
    "vtc.eval.cluster": {"ray"},
    "vtc.eval.mini.tower": {"onnx"},
    "vtc.eval.tiny.clip": {"open_clip"},
    "vtc.ops.walks": {"triton"},
}
"""What modules import that need not be installed, of other extras or of torch's, when they are asked for it."""


def test_every_import_is_declared(project: dict[str, Any]) -> None:
    core = declared(project["project"]["dependencies"])
    extra = declared(project["project"]["optional-dependencies"]["eval"])
    for package, allowed in (("vtc", core), ("vtc.adapters", core), ("vtc.eval", core | extra)):
        needed = {
            each
            for name, file in sources(package)
            for each in imports(file)
            if each.partition(".")[0] not in LATE.get(name, set())
        }
        assert distributions(needed) <= allowed, package


def test_every_declared_package_is_imported(project: dict[str, Any]) -> None:
    """Tools run as commands stand in the extras docs, notebooks and dev."""
    extras = project["project"]["optional-dependencies"]
    assert set(extras) == {"eval", "clip", "cluster", "mini", "docs", "notebooks", "dev"}
    used = distributions({each for package in FOLDERS for _, file in sources(package) for each in imports(file)})
    assert declared(project["project"]["dependencies"]) | declared(extras["eval"] + extras["cluster"]) <= used


# --- imports
LIGHT = ["--help", "--version", "methods", "models", "generate --help", "tasks --path"]


def test_light_commands_import_nothing_heavy() -> None:
    """One after the other in a process that has imported nothing."""
    code = (
        "import sys, contextlib, io\n"
        "from vtc.cli.main import main\n"
        f"for words in {LIGHT!r}:\n"
        "    sys.argv = ['vtc', *words.split()]\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit): main()\n"
        "    print(len(out.getvalue()), *sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    lines = run.stdout.splitlines()
    assert len(lines) == len(LIGHT) and run.stderr == ""
    for words, line in zip(LIGHT, lines, strict=True):
        printed, *loaded = line.split()
        assert int(printed) > 3, words
        assert under(set(loaded), "transformers", "PIL", *HEAVY) == set(), words


def test_python_minus_m_is_the_command() -> None:
    run = subprocess.run([sys.executable, "-m", "vtc", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == vtc.__version__


def test_an_import_stays_light() -> None:
    code = "import sys, vtc, vtc.adapters; vtc.list_methods(); print('\\n'.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    loaded = set(run.stdout.split())
    assert "vtc.methods.vtc_cls" in loaded
    assert under(loaded, "transformers", *HEAVY) == set()


def test_no_module_loads_a_model_class_or_a_benchmark() -> None:
    for name, file in [*sources("vtc"), *sources("vtc.adapters")]:
        used = imports(file, everywhere=False)
        assert under(used, "transformers.models", "transformers.AutoModelForImageTextToText", *HEAVY) == set(), name
        assert {each for each in used if each.startswith("transformers.") and each[13:].endswith("Generation")} == set()


@pytest.mark.parametrize("package", FOLDERS)
def test_packages_are_imported_by_their_full_names(package: str) -> None:
    for name, file in sources(package):
        assert under(imports(file), "adapters", "eval") == set(), name


def test_only_the_registry_of_families_names_them() -> None:
    families = {target.split(":")[0] for target in vtc.adapters.FAMILIES.values()}
    for name, file in sources("vtc"):
        if not name.startswith("vtc.testing"):
            assert under(imports(file), *families) == set(), name
        if name.startswith("vtc.methods."):
            assert under(imports(file, everywhere=False), *HEAVY) == set(), name


def test_nothing_is_asserted_about_callers() -> None:
    """`assert` vanishes under -O: VTCErrors are raised. What is left narrows types for the checker."""
    for name, file in [*sources("vtc"), *sources("vtc.adapters")]:
        if name.startswith("vtc.testing"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Assert):
                test = ast.unparse(node.test)
                assert "is not None" in test or test.startswith("isinstance("), f"{name}: assert {test}"


# --- what is published
@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The source distribution, and the wheel that is made of it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    return sorted(folder.iterdir())


@pytest.mark.slow
def test_an_installed_distribution_works_outside_the_repository(
    built: list[Path], tmp_path: Path, project: dict[str, Any]
) -> None:
    """In an environment of its own, whose other packages are those of the running one.

    A wheel that was made of the source distribution, so that both hold everything.
    """
    assert [file.name.rpartition("-")[2] for file in built] == ["any.whl", f"{project['project']['version']}.tar.gz"]
    file = built[0]
    assert file.name.startswith(f"visual_token_compression-{project['project']['version']}")
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=120)
    others = os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))
    variables = {**os.environ, "PYTHONPATH": others}

    def ask(program: str, *words: str) -> str:
        command = [str(environment / "bin" / program), *words]
        run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=variables, check=False)
        assert run.returncode == 0, run.stderr
        return run.stdout.strip()

    ask("python", "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", str(file))
    code = f"import vtc, importlib.metadata as m; print(vtc.__file__, m.version({DISTRIBUTION!r}))"
    where, version = ask("python", "-c", code).split()
    assert Path(where).is_relative_to(environment)
    assert version == vtc.__version__
    assert json.loads(ask("vtc", "models", "--json"))[0]["name"] == "tiny-llava"


# --- types
CONSUMER = """
import vtc
import vtc.adapters
from vtc.eval.spec import SweepSpec

handle: int = vtc.compress
adapter: int = vtc.adapters.of
folder: int = SweepSpec().folder
"""


@pytest.mark.slow
def test_a_strict_editable_installation_has_types(tmp_path: Path) -> None:
    """Other editable installations find vtc.adapters and vtc.eval by an import hook, which type checkers cannot run."""
    copy, consumer, environment = tmp_path / "copy", tmp_path / "consumer", tmp_path / "environment"
    for folder in ("vtc", "adapters", "eval"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy / file)
    consumer.mkdir()
    (consumer / "use.py").write_text(CONSUMER)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=120)
    others = os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))
    how = ["--no-index", "--no-deps", "--no-build-isolation", "--config-settings", "editable_mode=strict"]
    install = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", *how, "--editable", str(copy)]
    variables = {**os.environ, "PYTHONPATH": others}
    done = subprocess.run(install, capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stderr
    python = str(environment / "bin" / "python")
    check = [sys.executable, "-m", "mypy", "--python-executable", python, "--cache-dir", str(tmp_path), "use.py"]
    found = subprocess.run(check, capture_output=True, text=True, cwd=consumer, check=False).stdout
    assert all(told in found for told in ("-> Handle", "Adapter]", '"Path"')), found
    assert "import-not-found" not in found
