"""What a compressor reaches on held-out scenes, the way a user gets it: processor, `generate`, exact match."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtc.app.answer import Answerer
from vtc.app.loading import load
from vtc.app.preparation import Chat
from vtc.eval.tiny.benchmark import Row, benchmark_rows, scene_image
from vtc.eval.tiny.checking import CHECK_SEED
from vtc.eval.tiny.layout import VISUAL_TOKENS
from vtc.method.base import Compressor

BATCH = 30
GREEDY = {"max_new_tokens": 4, "do_sample": False}


@dataclass(frozen=True)
class Measurement:
    """Answers to questions about held-out scenes.

    right: whether each was right. families: of each question. kept: mean over the LLM's layers of the visual tokens
    that entered the layer, for each question; tokens: of those there were. layers: mean tokens entering each layer.
    """

    right: tuple[bool, ...]
    families: tuple[str, ...]
    kept: tuple[float, ...]
    tokens: int
    layers: tuple[float, ...]

    @property
    def accuracy(self) -> dict[str, float]:
        """Share of right answers per family, in their order, and "mean" over the families."""
        total, right = Counter(self.families), Counter(f for f, r in zip(self.families, self.right, strict=True) if r)
        shares = {family: right[family] / count for family, count in total.items()}
        return shares | {"mean": sum(shares.values()) / len(shares)}

    def kept_by_family(self) -> dict[str, float]:
        """Mean share of the visual tokens kept, per family."""
        groups: dict[str, list[float]] = {}
        for family, kept in zip(self.families, self.kept, strict=True):
            groups.setdefault(family, []).append(kept / self.tokens)
        return {family: statistics.fmean(values) for family, values in groups.items()}

    @property
    def retention(self) -> float:
        """Share of the visual tokens kept, mean over the questions."""
        return statistics.fmean(self.kept) / self.tokens

    @property
    def spread(self) -> float:
        """Standard deviation of the share kept, over the questions."""
        return statistics.pstdev(self.kept) / self.tokens

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
    split: str = "check",
    first_seed: int = CHECK_SEED,
    state: Mapping[str, Tensor] | None = None,
    device: str = "cpu",
) -> Measurement:
    """Ask an embedded model `per_family` questions of every family about scenes of a held-out split.

    method: None leaves the model untouched. state: weights of the model to use instead of its own.
    """
    loaded = load(name, device=device, dtype="float32")
    if state is not None:
        loaded.model.load_state_dict(state)
    answerer = Answerer(loaded)
    rows = benchmark_rows(per_family, split, first_seed)
    replies: list[str] = []
    kept: list[float] = []
    layers: Counter[int] = Counter()
    for start in range(0, len(rows), BATCH):
        batch = answerer.prepare([_chat(row, split) for row in rows[start : start + BATCH]])
        if method is None:
            replies += [answer.text.strip() for answer in answerer.generate(batch, GREEDY)]
            continue
        with answerer.compressed(method, retention=retention) as handle:
            replies += [answer.text.strip() for answer in answerer.generate(batch, GREEDY, handle)]
        call = handle.stats.calls[0]
        kept += call.visual_tokens_kept
        for layer, count in enumerate(_entering(call, loaded.model.config.get_text_config().num_hidden_layers)):
            layers[layer] += count
    return _result(rows, replies, kept, [layers[index] / len(rows) for index in sorted(layers)])


def _chat(row: Row, split: str) -> Chat:
    picture = {"type": "image", "image": scene_image(row.seed, split)}
    return Chat([{"role": "user", "content": [picture, {"type": "text", "text": row.question}]}])


def _entering(call: Any, depth: int) -> list[int]:
    """Visual tokens of the whole batch that enter each of `depth` layers."""
    now = sum(call.visual_tokens_in)
    after = {stage.stage: stage.visual_tokens_out for stage in call.stages}
    return [now := after.get(layer, now) for layer in range(depth)]


def _result(rows: Sequence[Row], replies: Sequence[str], kept: list[float], layers: list[float]) -> Measurement:
    right = tuple(row.answer == reply for row, reply in zip(rows, replies, strict=True))
    return Measurement(
        right,
        tuple(row.family for row in rows),
        tuple(kept or [float(VISUAL_TOKENS)] * len(rows)),
        VISUAL_TOKENS,
        tuple(layers),
    )
