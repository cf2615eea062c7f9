"""What a compressor reaches on held-out scenes, the way a user gets it: processor, `generate`, exact match."""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtc.app.answer import Answer, Answerer
from vtc.app.loading import load
from vtc.app.preparation import Chat
from vtc.eval.tiny.benchmark import Row, media, task_rows
from vtc.eval.tiny.checking import CHECK_SEED
from vtc.eval.tiny.tasks import TASKS
from vtc.eval.training.settings import asked
from vtc.method.base import Compressor

BATCH = 30
GREEDY = {"max_new_tokens": 4, "do_sample": False}


@dataclass(frozen=True)
class Measurement:
    """Answers to questions about held-out scenes.

    right: whether each was right. families: of each question. kept: mean over the LLM's layers of the visual tokens
    that entered the layer, for each question; counts: those there were. layers: mean tokens entering each layer.
    """

    right: tuple[bool, ...]
    families: tuple[str, ...]
    kept: tuple[float, ...]
    counts: tuple[int, ...]
    layers: tuple[float, ...]

    @property
    def accuracy(self) -> dict[str, float]:
        """Share of right answers per family, in their order, and "mean" over the families."""
        total, right = Counter(self.families), Counter(f for f, r in zip(self.families, self.right, strict=True) if r)
        shares = {family: right[family] / count for family, count in total.items()}
        return shares | {"mean": sum(shares.values()) / len(shares)}

    def percents(self, columns: Iterable[str]) -> list[str]:
        """Accuracies of families and "mean" in percent, as tables show them."""
        accuracy = self.accuracy
        return [f"{100 * accuracy[column]:.1f}" for column in columns]

    def kept_by_family(self) -> dict[str, float]:
        """Share of the visual tokens kept, per family."""
        sums: dict[str, tuple[float, int]] = {}
        for family, left, count in zip(self.families, self.kept, self.counts, strict=True):
            kept, total = sums.get(family, (0.0, 0))
            sums[family] = kept + left, total + count
        return {family: kept / total for family, (kept, total) in sums.items()}

    @property
    def tokens(self) -> float:
        """Visual tokens of a question, in the mean."""
        return statistics.fmean(self.counts)

    @property
    def retention(self) -> float:
        """Share of all visual tokens kept."""
        return sum(self.kept) / sum(self.counts)

    @property
    def spread(self) -> float:
        """Standard deviation of the share kept, over the questions."""
        return statistics.pstdev(left / count for left, count in zip(self.kept, self.counts, strict=True))

    def numbers(self) -> dict[str, float]:
        """Accuracies, retention and spread."""
        return {**self.accuracy, "retention": self.retention, "spread": self.spread}


@torch.no_grad()
def measure(
    name: str,
    method: Compressor | None,
    retention: float | None = None,
    per_family: int = 40,
    *,
    task: str = "tiny_image",
    split: str = "check",
    first_seed: int = CHECK_SEED,
    state: Mapping[str, Tensor] | None = None,
    device: str = "cpu",
) -> Measurement:
    """Ask an embedded model `per_family` questions of every family of a task about samples of a held-out split.

    method: None leaves the model untouched. state: weights of the model to use instead of its own.
    """
    loaded = load(name, device=device, dtype="float32")
    if state is not None:
        loaded.model.load_state_dict(state)
    answerer = Answerer(loaded)
    kinds = asked(task).geometries
    rows = sorted(task_rows(asked(task), per_family, split, first_seed), key=lambda row: row.seed % kinds)
    replies: list[Answer] = []
    for _, alike in itertools.groupby(rows, lambda row: row.seed % kinds):  # clips of one length
        chats = [_chat(row, task, split) for row in alike]
        for start in range(0, len(chats), BATCH):
            batch = answerer.prepare(chats[start : start + BATCH])
            with _attached(answerer, method, retention) as handle:
                replies += answerer.generate(batch, GREEDY, handle)
    return _result(rows, replies)


def _attached(answerer: Answerer, method: Compressor | None, retention: float | None) -> Any:
    return contextlib.nullcontext() if method is None else answerer.compressed(method, retention=retention)


def _chat(row: Row, task: str, split: str) -> Chat:
    kind = "video" if TASKS[task].media == "video" else "image"
    content = [{"type": kind, kind: each} for each in media(task, row.seed, split)]
    return Chat([{"role": "user", "content": [*content, {"type": "text", "text": row.question}]}])


def _result(rows: Sequence[Row], replies: Sequence[Answer]) -> Measurement:
    layers = [[count for layers, count in reply.layer_tokens for _ in range(layers)] for reply in replies]
    return Measurement(
        tuple(row.answer == reply.text.strip() for row, reply in zip(rows, replies, strict=True)),
        tuple(row.family for row in rows),
        tuple(reply.visual_tokens_kept for reply in replies),
        tuple(reply.visual_tokens_in for reply in replies),
        tuple(statistics.fmean(counts) for counts in zip(*layers, strict=True)),
    )
