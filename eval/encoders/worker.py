"""Answers items with an encoder: pictures are opened once, and every cell encodes the same batch in turn."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

import vtc
from vtc.adapters.pairs import Encoder
from vtc.app.costs import encoder_flops
from vtc.cost.token_counts import TokenCounts, constant
from vtc.engine.handle import Handle
from vtc.errors import VTCError
from vtc.eval.answering import Outcome
from vtc.eval.cells import Cell
from vtc.eval.encoders.tasks import PictureTask
from vtc.eval.failures import FAULTS, failure_record
from vtc.eval.plan import Item
from vtc.eval.runner import synchronise
from vtc.eval.store import Record


class PictureWorker:
    """One encoder, the tasks and the cells of a sweep."""

    def __init__(self, encoder: Encoder, tasks: Sequence[PictureTask], cells: Sequence[Cell]) -> None:
        self.encoder = encoder
        self.tasks = {task.name: task for task in tasks}
        self.cells: Mapping[str, Cell] = {cell.key(): cell for cell in cells}

    def run(self, item: Item, following: Item | None = None) -> Iterator[Outcome]:
        """Outcomes of every cell of `item`; a picture that cannot be read is one failure of all cells.

        A cell that fails on a batch fails on all its pictures.
        """
        task = self.tasks[item.task]
        pixels: dict[int, Tensor] = {}
        for doc_id in item.doc_ids:
            try:
                pixels[doc_id] = self.encoder.prepare(task.documents[doc_id].open())
            except FAULTS as error:
                failure = failure_record("prepare", task.key, item.cells, (doc_id,), error)
                yield Outcome(item.cells, failure=failure)
        if not pixels:
            return
        doc_ids, batch = tuple(pixels), torch.stack(list(pixels.values())).to(self.encoder.weight)
        for key in item.cells:
            try:
                rows = self._answers(task, self.cells[key], doc_ids, batch, item.doc_ids[0])
                yield Outcome((key,), rows=rows)
            except FAULTS as error:
                yield Outcome((key,), failure=failure_record("answer", task.key, (key,), doc_ids, error))

    def _answers(
        self, task: PictureTask, cell: Cell, doc_ids: Sequence[int], batch: Tensor, first: int
    ) -> tuple[Record, ...]:
        device = self.encoder.weight.device
        with self.attached(cell) as handle:
            synchronise(device)
            began = time.perf_counter()
            features = self.encoder.pictures(batch)
            synchronise(device)
            seconds = (time.perf_counter() - began) / len(doc_ids)
        if not bool(features.isfinite().all()):
            raise VTCError(f"{cell.label} made features that are no numbers; try --dtype float32")
        about = {"cell": cell.key(), "task": task.name, "task_fp": task.fingerprint, "repeat": 0}
        about |= {"batch": first, "seconds": seconds}
        answers = task.answers(features, doc_ids)
        costs = self._costs(batch, handle)
        return tuple(
            {**about, "doc_id": doc_id, **cost, **answer}
            for doc_id, cost, answer in zip(doc_ids, costs, answers, strict=True)
        )

    def attached(self, cell: Cell) -> contextlib.AbstractContextManager[Handle | None]:
        """The method of a cell on the encoder; nothing for the untouched one.

        Raises:
            VTCError: the method cannot act on it, or not at this budget.
        """
        if cell.compressor is None:
            return contextlib.nullcontext()
        limits = vars(cell.budget) if cell.budget is not None and cell.compressor.needs_budget else {}
        return vtc.compress(self.encoder.model, cell.compressor, trace=False, **limits)

    def _costs(self, batch: Tensor, handle: Handle | None) -> list[Record]:
        """Patches and operations of each image. The share kept is what leaves the last layer."""
        shape, patches = self.encoder.adapter.shape, self.encoder.patches(batch)
        untouched = constant(shape.layers, patches)
        whole = encoder_flops(shape, None, untouched)
        if handle is None or not handle.stats.calls:
            costs = {"visual_tokens_in": patches, "visual_tokens_kept": float(patches), "flops": round(whole)}
            return [{**costs, "flops_share": 1.0}] * len(batch)
        call, plan = handle.stats.calls[-1], handle.plan
        found = []
        for row, kept in enumerate(call.visual_tokens_kept):
            entering = TokenCounts(tuple((layers, counts[row]) for layers, counts in call.entering))
            flops = encoder_flops(shape, plan, entering)
            costs = {"visual_tokens_in": patches, "visual_tokens_kept": kept, "flops": round(flops)}
            found.append({**costs, "flops_share": round(flops / whole, 6)})
        return found
