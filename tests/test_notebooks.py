"""Notebooks run from top to bottom, on models of every kind, and were committed with their outputs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from vtc.testing import tiny_model

HERE = Path(__file__).parent
NOTEBOOKS = sorted((HERE.parent / "notebooks").glob("*.ipynb"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::RuntimeWarning"),
]


def read(path: Path) -> Any:
    import nbformat

    return nbformat.read(path, as_version=4)


def execute(notebook: Any, folder: Path) -> str:
    """Run every cell in `folder`; what they printed."""
    from nbclient import NotebookClient

    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def pictures(notebook: Any, cell: str) -> int:
    """How many figures a cell drew."""
    (found,) = (one for one in notebook.cells if one.get("id") == cell)
    return sum("image/png" in output.get("data", {}) for output in found.outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path) -> None:
    notebook = read(path)
    committed = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert committed and all(cell.execution_count is not None for cell in committed), "run `make notebooks`"
    execute(notebook, tmp_path)


def processor_of(name: str) -> Any:
    """The published processor class of a family at the tiny model's sizes, as the processors' own tests build it."""
    file = HERE / "adapters" / f"test_{'qwen' if name.startswith('qwen') else 'tiled'}_processors.py"
    spec = importlib.util.spec_from_file_location("processors", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build_processor(name)


@pytest.mark.parametrize("name", ["llava-next", "llava-onevision", "internvl", "qwen2.5-vl"])
def test_the_quick_start_runs_on_every_kind_of_model(name: str, tmp_path: Path) -> None:
    """Tiled images, shrunk maps, tiles of unknown place, videos: with another model in the cell of parameters."""
    model, processor = tiny_model(name, layers=6), processor_of(name)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    notebook = read(NOTEBOOKS[0])
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    cell.source = f"MODEL = {str(tmp_path / 'model')!r}"
    notebook.cells = [cell for cell in notebook.cells if "check_method" not in cell.source]
    printed = execute(notebook, tmp_path)
    assert printed.startswith(type(model).__name__)
    assert pictures(notebook, "c3f1e532") == 1
    assert pictures(notebook, "video-code") == (name != "llava-next")


def test_there_is_a_quick_start() -> None:
    assert NOTEBOOKS[0].name == "01_quickstart.ipynb"
