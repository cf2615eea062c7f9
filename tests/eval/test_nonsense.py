"""NaN from a model, a method or a metric, and missing weights end a cell with the reason, never an answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import vtc
from vtc.app import loading
from vtc.app.answer import answer
from vtc.app.nonsense import FiniteLogits, checking
from vtc.errors import InputError, VTCError
from vtc.eval.scoring import NotFinite, NotScored, score
from vtc.eval.spec import make_spec
from vtc.eval.store import Store
from vtc.eval.sweep import SweepResult, run_sweep
from vtc.method.registry import METHODS
from vtc.method.view import StageView
from vtc.ops import greedy, select

WriteTask = Callable[..., Path]


@pytest.fixture
def sweep(task_folder: Path, model_folder: Path, tmp_path: Path) -> Callable[..., SweepResult]:
    """A function that sweeps six questions of `blobs`, in batches of three."""

    def run(**settings: Any) -> SweepResult:
        defaults = {
            "model": str(model_folder), "methods": ["random"], "retentions": [0.1], "tasks": ["blobs"],
            "include_path": [task_folder], "batch_size": 3, "limit": 6, "out": tmp_path / "out",
        }  # fmt: skip
        return run_sweep(make_spec(defaults | settings))

    return run


@pytest.fixture
def damaged(model_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that copies the checkpoint, with its weights changed by a function and settings of its config."""

    def damage(change: Callable[[dict[str, Tensor]], None] = lambda weights: None, **text: Any) -> Path:
        folder = tmp_path / "damaged"
        shutil.copytree(model_folder, folder)
        (file,) = folder.glob("*.safetensors")
        weights = load_file(file)
        change(weights)
        save_file(weights, file, metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        config["text_config"] |= text
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return damage


def head(weights: dict[str, Tensor]) -> str:
    return next(key for key in weights if "lm_head" in key)


def behead(weights: dict[str, Tensor]) -> None:
    del weights[head(weights)]


def poison(weights: dict[str, Tensor]) -> None:
    weights[head(weights)][7] = torch.nan


@dataclass(frozen=True)
class Nonsense(vtc.ScoringCompressor):
    """Scores that are NaN for one token of every item."""

    name: ClassVar[str] = "nonsense"

    def score(self, view: StageView) -> Tensor:
        scores = view.tokens.sum(-1)
        scores[:, 3] = torch.nan
        return scores


@pytest.fixture
def nonsense() -> Iterator[None]:
    """The method above, registered."""
    METHODS.register(Nonsense)
    yield
    METHODS.unregister("nonsense")


def test_a_model_that_computes_nan_answers_nothing(
    sweep: Callable[..., SweepResult], damaged: Callable[..., Path]
) -> None:
    result = sweep(model=str(damaged(poison)))
    assert len(result.failures) == 2 and result.answered == 0
    for failure in result.failures:
        assert failure["stage"] == "answer" and "next token are NaN or infinite in 3 of 3 rows" in failure["reason"]
    assert not list(Store(result.folder).rows())
    assert all("NaN" in entry.reason for entry in result.results.incomplete)


def test_generate_says_so_as_well(damaged: Callable[..., Path]) -> None:
    from PIL import Image

    loaded = loading.load(str(damaged(poison)), device="cpu")
    with pytest.raises(VTCError, match="the question: the model's scores for the next token are NaN"):
        answer(loaded, [Image.new("RGB", (64, 64))], "What color is the ring?", max_new_tokens=2)


def test_forbidden_tokens_are_no_nonsense() -> None:
    logits = FiniteLogits()
    scores = torch.tensor([[0.0, -torch.inf], [-torch.inf, 2.0]])
    assert logits(torch.zeros(2, 1, dtype=torch.long), scores) is scores
    logits.check("two questions")
    for wrong in (torch.nan, torch.inf):
        logits = FiniteLogits()
        logits(torch.zeros(2, 1, dtype=torch.long), torch.tensor([[0.0, wrong], [1.0, 2.0]]))
        logits(torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, 2))
        with pytest.raises(VTCError, match=r"two questions: .* in 1 of 2 rows"):
            logits.check("two questions")


def test_the_answers_are_those_of_generate_itself(runner: Any, blobs: Any) -> None:
    batch = runner.prepare([blobs.conversation(doc_id) for doc_id in range(3)])
    generation = blobs.generation({})
    for extra in ({}, {"num_beams": 2}):
        arguments = generation.arguments | extra
        with torch.inference_mode():
            plain = runner.model.generate(**batch.inputs, **arguments)
            noted = runner.model.generate(**batch.inputs, **arguments, logits_processor=[FiniteLogits()])
        assert torch.equal(plain, noted)


def test_a_method_that_ranks_by_nan_is_named_and_its_answers_are_not_kept(
    sweep: Callable[..., SweepResult], nonsense: None
) -> None:
    result = sweep(methods=["nonsense", "random"])
    (failure,) = result.failures
    assert failure["stage"] == "answer" and failure["error"] == "VTCError"
    assert "'nonsense' ranks by numbers that are NaN (3 of 432)" in failure["reason"]
    (cell,) = failure["cells"]
    assert {row["cell"] for row in Store(result.folder).rows()} == set(Store(result.folder).cells()) - {cell}
    assert {line["method"] for line in result.results.lines} == {"none", "random"}


def test_nobody_looks_at_scores_after_the_first_batch(
    sweep: Callable[..., SweepResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vtc.ops import checks

    looked: list[bool] = []
    original = select.numbers
    monkeypatch.setattr(
        select, "numbers", lambda *given: looked.append(checks.looking.get() is not None) or original(*given)
    )
    sweep()
    assert looked == [True, False]


@pytest.mark.parametrize(
    "rank",
    [
        lambda values, mask: select.top_k(values, torch.tensor([2]), mask),
        lambda values, mask: select.settle(values, mask),
        lambda values, mask: greedy.best(values, mask),
        lambda values, mask: greedy.k_center(values[..., None].expand(-1, -1, 2), torch.tensor([0]), 2, mask),
        lambda values, mask: greedy.greedy_map(torch.ones(1, 3, 2), values, 2, mask),
    ],
)
def test_every_way_to_rank_looks_behind_the_mask_and_only_when_asked(rank: Callable[[Tensor, Tensor], Tensor]) -> None:
    values = torch.tensor([[1.0, 2.0, torch.nan]])
    everything, real = torch.tensor([[True, True, True]]), torch.tensor([[True, True, False]])
    rank(values, everything)
    with checking("mine"):
        rank(values, real)
        with pytest.raises(VTCError, match=r"'mine' ranks by numbers that are NaN \(1 of 3\)"):
            rank(values, everything)


def test_a_checkpoint_without_its_head_is_refused(damaged: Callable[..., Path]) -> None:
    folder = damaged(behead)
    with pytest.raises(InputError, match=r"checkpoint lacks lm_head\.weight, which would be random numbers"):
        loading.load(str(folder), device="cpu")


def test_weights_of_another_model_are_refused(damaged: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no place for .*layers\.1\..* more weights of the checkpoint"):
        loading.load(str(damaged(num_hidden_layers=1)), device="cpu")
    shutil.rmtree(tmp_path / "damaged")
    with pytest.raises(InputError, match=r"checkpoint lacks .*layers\.2\.\S+ and \d+ more weights"):
        loading.load(str(damaged(num_hidden_layers=3)), device="cpu")
    shutil.rmtree(tmp_path / "damaged")
    with pytest.raises(InputError, match=r"cannot load model .*damaged|is .* in the checkpoint and"):
        loading.load(str(damaged(intermediate_size=48)), device="cpu")


def test_left_over_and_tied_weights_are_no_reason(damaged: Callable[..., Path], tmp_path: Path) -> None:
    extra = {"score.weight": torch.zeros(2, 32), "model.language_model.rotary_emb.inv_freq": torch.zeros(8)}
    assert loading.load(str(damaged(lambda weights: weights.update(extra))), device="cpu").model is not None
    shutil.rmtree(tmp_path / "damaged")
    folder = damaged(behead, tie_word_embeddings=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    model = loading.load(str(folder), device="cpu").model
    assert model.lm_head.weight is model.get_input_embeddings().weight


def rows(count: int) -> list[dict[str, Any]]:
    return [{"doc_id": doc_id, "repeat": 0, "text": "red"} for doc_id in range(count)]


@pytest.mark.parametrize(
    ("result", "error", "words"),
    [
        ('float("nan")', NotFinite, "task 'blobs': accuracy is nan, .*which cannot be compared"),
        ('float("inf") if items else 0.0', NotFinite, "accuracy is inf"),
        ("None", NotScored, r"'blobs' has no metric that is a number \(accuracy is NoneType"),
    ],
)
def test_metrics_that_are_no_numbers_are_an_error(
    tmp_path: Path, write_task: WriteTask, result: str, error: type[Exception], words: str
) -> None:
    from vtc.eval.catalogue import load_tasks

    folder = write_task(tmp_path)
    code = (folder / "utils.py").read_text()
    mean = 'return sum(item["score"] for item in items) / len(items)'
    assert mean in code
    (folder / "utils.py").write_text(code.replace(mean, f"return {result}"))
    (task,) = load_tasks(["blobs"], [folder])
    with pytest.raises(error, match=words):
        score(task, rows(10), 10)


def test_a_metric_that_comes_out_nan_ends_its_cell(
    sweep: Callable[..., SweepResult], tmp_path: Path, write_task: WriteTask
) -> None:
    folder = write_task(tmp_path / "tasks")
    code = (folder / "utils.py").read_text()
    (folder / "utils.py").write_text(code.replace("/ len(items)", '/ len(items) if len(items) < 3 else float("nan")'))
    result = sweep(include_path=[folder])
    assert [failure["stage"] for failure in result.failures] == ["score", "score"]
    assert all("accuracy is nan" in failure["reason"] for failure in result.failures)
    assert not result.results.lines and len(result.results.incomplete) == 2
