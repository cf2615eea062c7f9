"""What README tells readers to write can be written: its Python runs, its method keeps the contract."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import vtc
import vtc.testing
from vtc.method.registry import METHODS
from vtc.testing import tiny_inputs, tiny_model

ROOT = Path(__file__).parents[1]
BLOCKS: list[str] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
OWN = next(block for block in BLOCKS if "ScoringCompressor" in block)
SIZES = ["llava-next", "qwen2.5-vl"]  # models whose items differ in size


def run(block: str, **names: Any) -> dict[str, Any]:
    """Execute a block as a reader would behind `import vtc`; the names it leaves."""
    exec(compile(block, "README.md", "exec"), names := {"vtc": vtc, **names})
    return names


@pytest.mark.parametrize(
    "block",
    [block for block in BLOCKS if block is not OWN and ">>>" not in block],
    ids=lambda block: block.split("\n")[0],
)
def test_every_block_runs(block: str, clip: Any, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = tiny_inputs("llava-clip", [[4, "image", 3], [9]], model=clip)
    assert "model.generate(**inputs)" in block
    clip.generation_config.max_new_tokens = 3
    names = run(block, model=clip, inputs=inputs)
    assert names["output"].shape == (2, inputs["input_ids"].shape[1] + 3)
    assert 0 < names["handle"].stats.retention < 1
    assert not names["handle"].errors


def test_the_method_of_ones_own_keeps_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Any] = []
    few = functools.partial(vtc.testing.check_method, models=SIZES, generation=["greedy"], steps=2)
    monkeypatch.setattr(vtc.testing, "check_method", lambda *args: checked.append(few(*args)))
    before = vtc.list_methods()
    names = run(OWN)
    assert {*vtc.list_methods()} - {*before} == {"unusual"}
    METHODS.unregister("unusual")
    (cells,) = checked
    assert {cell.model for cell in cells} == set(SIZES)
    assert all(cell.passed and cell.method == "unusual" for cell in cells)
    assert issubclass(names["Unusual"], vtc.Compressor)


def test_what_documents_call_is_there_after_a_bare_import() -> None:
    """Every `vtc.x.y(` of the documents and docstrings, in a fresh interpreter that ran `import vtc`."""
    texts = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    texts += [file for name in ("vtc", "adapters", "eval") for file in (ROOT / name).rglob("*.py")]
    called = {name for text in texts for name in re.findall(r"\b(vtc(?:\.\w+)+)\(", text.read_text())}
    assert {"vtc.testing.check_method", "vtc.learned.load", "vtc.compress"} <= called
    names = sorted(name for name in called if name.split(".")[1] not in vtc.__all__)
    # A child of one fresh interpreter for each name, since one import would put names in reach of the next.
    code = f"""
import os, vtc
for name in {names!r}:
    if not (child := os.fork()):
        os._exit(0 if callable(eval(name)) else 1)
    assert os.waitpid(child, 0)[1] == 0, name
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_unknown_attributes_are_refused_as_everywhere() -> None:
    with pytest.raises(AttributeError, match="module 'vtc' has no attribute 'tests'"):
        vtc.tests  # noqa: B018


# --- means over items of different size
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_of_an_item_leaves_its_padding_out(dtype: torch.dtype) -> None:
    model = tiny_model("qwen2.5-vl").to(dtype)
    inputs = tiny_inputs("qwen2.5-vl", [[4, "image", 3, "video", 5], [2, "image", 12]], seed=3, model=model)
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    seen: list[vtc.StageView] = []

    class Look(vtc.Compressor):
        name = "look"
        needs_budget = False

        def select(self, view: vtc.StageView) -> None:
            seen.append(view)

    with vtc.compress(model, Look()), torch.no_grad():
        model(**inputs)
    (view,) = seen
    assert len(set(view.items.counts)) > 1
    for values in (view.tokens, view.tokens[..., 0], view.tokens[..., None]):
        found = view.mean(values)
        assert (found.dtype, found.shape) == (torch.float32, (len(view.items), *values.shape[2:]))
        for index, count in enumerate(view.items.counts):
            expected = values[index, :count].double().mean(0)
            assert float((found[index] - expected).abs().max()) < 1e-5
    filled = view.tokens.masked_fill(~view.items.mask[..., None], torch.nan)
    assert torch.equal(view.mean(filled), view.mean(view.tokens))
