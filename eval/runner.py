"""Cells answer batches: `vtc.app.answer` under a cell's method and a task's generation settings.

Knows nothing of lmms-eval: it takes conversations and returns answers. A batch is prepared once and answered by as many
cells as wanted; inside `Runner.sharing` its images are encoded once as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import vtc
from vtc.adapters.placement import device_of
from vtc.app.answer import Answer, Answerer, Batch
from vtc.app.likelihood import Likelihood, likelihoods
from vtc.app.preparation import Chat
from vtc.batch.trace import CallRecord
from vtc.engine.sharing import SharedEncoder
from vtc.errors import UnsupportedModel
from vtc.eval.cells import Cell
from vtc.eval.downsample import Downsampler
from vtc.eval.generation import Generation
from vtc.method.base import Compressor
from vtc.method.budget import Budget

SMALL = 50_000_000  # parameters


class Runner(Answerer):
    """Answers batches of conversations with one loaded model, cell by cell."""

    def __init__(self, loaded: Any) -> None:
        """Use the model and processor that `vtc.app.loading.load` returned.

        Raises:
            UnsupportedModel: the processor has no chat template.
        """
        super().__init__(loaded)
        self.downsampler = Downsampler(loaded)
        self._checked: set[str] = set()  # cells whose method has ranked by numbers once
        if not getattr(self.processor, "chat_template", None):
            raise UnsupportedModel(f"{loaded.name!r} has no chat template, so its prompts cannot be written")

    def check(self, cell: Cell) -> Cell:
        """The cell with its position policy resolved.

        Raises:
            VTCError: the method cannot run on this model, or not at this budget.
        """
        if cell.compressor is None:
            return cell
        with self._attached(cell.compressor, cell) as handle:
            return dataclasses.replace(cell, positions=handle.positions)

    def check_chat(self, cell: Cell, chat: Chat) -> None:
        """Refuse a conversation that a cell cannot answer within its budget.

        Raises:
            BudgetError: its pictures have too many tokens at any size.
        """
        if cell.scales is not None:
            self.downsampler.check(chat, cell.scales)

    def _attached(self, compressor: Compressor, cell: Cell, *, trace: bool = False) -> vtc.Handle:
        # several together hold their budgets
        limits = vars(cell.budget) if cell.budget is not None and compressor.needs_budget else {}
        return self.compressed(compressor, positions=cell.positions, trace=trace, **limits)

    @torch.inference_mode()
    def prefill(self, batch: Batch, cell: Cell) -> tuple[list[dict[str, Any]], float]:
        """Run the prompts of `batch` through the model under a cell's method, and nothing more.

        Returns what the costs of each question are, see `vtc.app.costs`, and the seconds it took. Raises VTCError where
        the method cannot run, or not at this budget.
        """
        attached = contextlib.nullcontext() if cell.compressor is None else self._attached(cell.compressor, cell)
        device = device_of(self.model)
        with attached as handle:
            if handle is not None:
                batch.tell(handle)
            synchronise(device)
            start = time.perf_counter()
            self.model(**batch.inputs, use_cache=True, logits_to_keep=1)
            synchronise(device)
            seconds = time.perf_counter() - start
            return self.spent(batch, handle), seconds

    def scaled(self, chats: Sequence[Chat], budget: Budget, like: Batch | None = None) -> Batch:
        """Like `prepare`, with pictures and videos scaled down until their visual tokens meet the budget.

        like: the same conversations as they are, whose costs shares refer to.
        """
        small = self.prepare([self.downsampler.smaller(chat, budget) for chat in chats])
        return small if like is None else dataclasses.replace(small, full=like.works)

    def sharing(self, cells: Sequence[Cell]) -> SharedEncoder:
        """Inside this context, the images of a batch are encoded by the first of `cells` that answers it."""
        return vtc.share_encoder(self.model, [cell.compressor for cell in cells if cell.compressor is not None])

    def answer(
        self,
        batch: Batch,
        cell: Cell,
        generation: Generation,
        *,
        seed: int = 0,
        trace: list[CallRecord] | None = None,
    ) -> list[Answer]:
        """The B answers of `cell`, cut at stop strings. seed: used by sampling only. trace: gets what was kept.

        Raises:
            VTCError: NaN, which is looked for among what a method ranks by in the first batch of each cell.
            Exception: whatever else `Answerer.generate` raises; nothing is answered in its place.
        """
        drawn = seed if generation.samples else None
        if cell.compressor is None:
            answers = self.generate(batch, generation.arguments, seed=drawn)
        else:
            blame = None if cell.key() in self._checked else cell.label
            with self._attached(cell.compressor, cell, trace=trace is not None) as handle:
                answers = self.generate(batch, generation.arguments, handle, seed=drawn, blame=blame)
            if trace is not None:
                trace += handle.trace[:1]
            self._checked.add(cell.key())
        return [dataclasses.replace(answer, text=generation.cut(answer.text)) for answer in answers]

    def likelihoods(self, batch: Batch, cell: Cell, completions: Sequence[str]) -> list[Likelihood]:
        """How likely the B completions are under `cell`, see `vtc.app.likelihood`."""
        if cell.compressor is None:
            return likelihoods(self, batch, completions)
        with self._attached(cell.compressor, cell) as handle:
            return likelihoods(self, batch, completions, handle)


@contextlib.contextmanager
def few_threads(model: torch.nn.Module) -> Iterator[None]:
    """One torch thread for a small model on the CPU.

    Its matrices are hardly worth splitting, and where a second core is busy with something else, waiting for it after
    every one of them makes answers ten times slower.
    """
    threads = torch.get_num_threads()
    small = sum(parameter.numel() for parameter in model.parameters()) < SMALL
    if small and device_of(model).type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def synchronise(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def batch_seed(*parts: object) -> int:
    """A 63-bit seed that depends on `parts` only, the same in every process.

    >>> batch_seed(0, "pope", 24) == batch_seed(0, "pope", 24) != batch_seed(0, "pope", 48)
    True
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8]) >> 1
