"""Notebooks run from top to bottom, on models of every kind, and were committed with their outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vtc.testing import tiny_model
from vtc.testing.processors import tiny_processor

HERE = Path(__file__).parent
NOTEBOOKS = sorted((HERE.parent / "notebooks").glob("*.ipynb"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::RuntimeWarning"),
]


def read(path: Path) -> Any:
    import nbformat

    return nbformat.read(path, as_version=4)


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """A process that runs notebooks one after the other: importing takes longer than most of them."""
    from nbclient import NotebookClient
    from nbformat.v4 import new_notebook

    client = NotebookClient(new_notebook(), timeout=300)
    yield client
    client.nb = new_notebook()
    client.execute(cleanup_kc=True)


@pytest.fixture
def execute(client: Any, tmp_path: Path) -> Callable[..., str]:
    """A function that runs every cell without names from elsewhere, in a fresh folder; what the cells printed."""
    from nbformat.v4 import new_code_cell

    def run(notebook: Any, model: str = "") -> str:
        first = [
            "%reset -f",
            f"__import__('os').chdir({str(tmp_path)!r})",
            "__import__('os').environ.pop('VTC_MODEL', None)",
            *([f"__import__('os').environ['VTC_MODEL'] = {model!r}"] if model else []),
        ]
        notebook.cells.insert(0, new_code_cell("\n".join(first)))
        client.nb = notebook
        client.execute(cleanup_kc=False)
        outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
        assert not [output for output in outputs if output.output_type == "error"]
        return "".join(output.text for output in outputs if output.output_type == "stream")

    return run


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, execute: Callable[..., str]) -> None:
    notebook = read(path)
    committed = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert committed and all(cell.execution_count is not None for cell in committed), "run `make notebooks`"
    execute(notebook)


@pytest.mark.parametrize("name", ["llava-onevision", "internvl", "qwen2.5-vl"])
def test_the_quick_start_runs_on_every_kind_of_model(name: str, tmp_path: Path, execute: Callable[..., str]) -> None:
    """Shrunk maps, tiles of unknown place, videos: with another model in the cell of parameters."""
    model, processor = tiny_model(name, layers=6), tiny_processor(name)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    notebook = read(NOTEBOOKS[0])
    assert execute(notebook, str(tmp_path / "model")).startswith(type(model).__name__)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    drawn = sum("image/png" in output.get("data", {}) for output in outputs)
    assert drawn == 3  # the scene, what is kept of it, and of a clip


def test_there_is_a_quick_start() -> None:
    assert NOTEBOOKS[0].name == "01_quickstart.ipynb"
