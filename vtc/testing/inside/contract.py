"""What every method inside an encoder keeps on every encoder: the contract's counterpart without an LLM.

What is left equals a plain loop over one image; a batch equals its images; the rows that are told are those that enter
the blocks; retention 1.0 changes no bit; nothing is left behind.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtc import adapters
from vtc.app.catalogue import acting_inside
from vtc.engine.attach import compress
from vtc.engine.handle import Handle
from vtc.errors import UnsupportedMethod
from vtc.method.base import Compressor
from vtc.method.registry import create
from vtc.testing.contract import LIMIT, Deviation
from vtc.testing.encoders import BLOCKS, PREFIX, Seen, build, by_hand, drawn, encode, pixels
from vtc.testing.inside import Plain, case_of
from vtc.testing.snapshot import snapshot

KEEPS = (10, 3)
"""Of 16 patches: the smaller number takes several passes of those that halve at most."""


@dataclass(frozen=True)
class Cell(Deviation):
    """One comparison. refused: why it cannot be made on this encoder, which then has no deviation."""

    refused: str = ""


@functools.cache
def built(encoder: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny encoder, which nobody changes."""
    return build(encoder, dtype)


@functools.cache
def inside(encoder: str) -> dict[str, dict[str, Any]]:
    """The registered methods that act inside a tiny encoder, with the hyper-parameters that put them there."""
    return acting_inside(built(encoder))


@torch.no_grad()
def check(name: str, encoder: str) -> list[Cell]:
    """Every variant of one method on one tiny encoder, `encoder` being one of `vtc.testing.encoders.NAMES`."""
    case, cells = case_of(name), list[Cell]()
    for variant in case.variants:
        method = create(name, **inside(encoder)[name], **variant)
        options = ", ".join(f"{key}={value!r}" for key, value in variant.items())
        label = f"{name}({options})" if options else name
        one = _Check(method, case.plain, encoder, built(encoder))
        cells += [Cell(label, encoder, *found) for found in one.run(drawn(5))]
    return cells


@dataclass(frozen=True, eq=False)
class _Check:
    """One method on one model."""

    method: Compressor
    plain: Plain
    encoder: str
    model: Any

    def run(self, images: Tensor) -> Iterator[tuple[str, float, float, str]]:
        """(check, worst, limit, why it is refused) of each."""
        untouched = encode(self.model, images)
        before = snapshot(self.model)
        for keep in KEEPS if self.method.needs_budget else (None,):
            yield from self._exact(images, keep)
        if self.method.needs_budget:
            with compress(self.model, self.method, retention=1.0):
                yield "retention 1.0, bit-identical", _different(encode(self.model, images), untouched), 0.0, ""
        yield "nothing left behind", self._left_behind(images, before), 0.0, ""
        yield "untouched behind it, bit-identical", _different(encode(self.model, images), untouched), 0.0, ""
        yield "bfloat16 runs", self._half_precision(), 0.0, ""

    def _exact(self, images: Tensor, keep: int | None) -> Iterator[tuple[str, float, float, str]]:
        expected = [self._by_hand(image, keep) for image in images]
        found = [self._attached(image[None], keep) for image in images]
        together = list(zip(found, expected, strict=True))
        pooled = [(one[0], other[0]) for one, other in together]
        rows = [(one[1], other[1]) for one, other in together]
        yield "plain loop", _apart(pooled + rows), LIMIT, ""
        yield "counts told", float(any(one[2] != other[2] for one, other in together)), 0.0, ""
        alone = torch.cat([one[0] for one in found])
        try:
            yield "batch = singles", _apart([(self._attached(images, keep)[0], alone)]), LIMIT, ""
        except UnsupportedMethod as error:
            yield "batch = singles", 0.0, LIMIT, str(error)

    def _attached(self, images: Tensor, keep: int | None) -> tuple[Tensor, Tensor, tuple[float, ...]]:
        """Pooled outputs [B, D], rows [T, D] of the first image that leave the last block, and counts.

        The counts are how many rows entered each block, and how many patches each image has left.
        """
        last: list[Tensor] = []
        with (
            compress(self.model, self.method, keep=keep) as handle,
            self._end.register_forward_hook(lambda module, args, output: last.append(output[0])),
        ):
            pooled = encode(self.model, images)
        call = handle.stats.calls[0]
        return pooled, last[0], (*call.layer_rows, *call.visual_tokens_kept)

    def _by_hand(self, image: Tensor, keep: int | None) -> tuple[Tensor, Tensor, tuple[float, ...]]:
        """The same of one image by the plain loop."""
        lead, entered = PREFIX[self.encoder], list[int]()
        act = self.plain(self.method, image, lead, keep)

        def counted(layer: int, rows: Tensor, seen: Seen | None) -> tuple[Tensor, Tensor | None]:
            rows, sizes = act(layer, rows, seen)
            entered.append(len(rows))
            return rows, sizes

        pooled, rows = by_hand(self.model, image, counted)
        return pooled[None], rows, (*entered[:BLOCKS], len(rows) - lead)

    def _left_behind(self, images: Tensor, before: dict[str, Any]) -> float:
        """0.0 when the model is as `before` after the runs so far and after one that ends in an error."""
        leftovers = float(snapshot(self.model) != before)
        breaker = self._end.register_forward_pre_hook(lambda module, args: 1 / 0)
        with breaker, suppress(ZeroDivisionError), self._attach(self.model):
            encode(self.model, images[:1])
        return leftovers + float(snapshot(self.model) != before)

    def _half_precision(self) -> float:
        """0.0 when outputs are finite numbers of that type."""
        model = built(self.encoder, torch.bfloat16)
        with self._attach(model):
            output = encode(model, pixels(2).bfloat16())
        return float(output.dtype != torch.bfloat16 or not output.isfinite().all())

    def _attach(self, model: Any) -> Handle:
        return compress(model, self.method, keep=KEEPS[0] if self.method.needs_budget else None)

    @property
    def _end(self) -> torch.nn.Module:
        """The last block."""
        adapter = adapters.encoder_of(self.model)
        assert adapter is not None
        last: torch.nn.Module = adapter.vision_layers[-1]
        return last


def _apart(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The largest difference within any pair, infinite between different shapes; NaN wins."""
    gaps = [(a - b).abs().max() if a.shape == b.shape else torch.tensor(torch.inf) for a, b in pairs]
    return float(torch.stack(gaps).max())


def _different(found: Tensor, expected: Tensor) -> float:
    """0.0 for equal bits, else the largest difference."""
    return 0.0 if torch.equal(found, expected) else max(_apart([(found, expected)]), 1e-30)
