"""The path every user takes: chat template -> processor -> `model.generate`, inside `vtc.compress` or without it.

Knows nothing of lmms-eval: it takes conversations and returns answers. A batch is prepared once and answered by as many
cells as wanted; inside `Runner.sharing` its images are encoded once as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vtc
from vtc.app.nonsense import FiniteLogits, checking
from vtc.app.preparation import prepare
from vtc.app.template import system_length
from vtc.engine.sharing import SharedEncoder
from vtc.errors import InputError, UnsupportedModel
from vtc.eval.cells import Cell
from vtc.eval.generation import Generation
from vtc.method.base import Compressor

Conversation = Sequence[Mapping[str, Any]]
SMALL = 50_000_000  # parameters


@dataclass(frozen=True)
class Batch:
    """Inputs of B prompts on the model's device, left-padded.

    `visual_tokens` (B) counts their image placeholders, `system_lengths` (B) the tokens in front of the user's words.
    """

    inputs: Mapping[str, Any]
    visual_tokens: tuple[int, ...]
    system_lengths: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.visual_tokens)


@dataclass(frozen=True)
class Answer:
    """One answer and what it cost.

    `input_tokens` is the prompt's length before compression. `visual_tokens_kept` is the mean, over the layers of the
    language model, of the visual tokens that enter the layer. `seconds` is this answer's share of the batch's generate
    time, `engine_seconds` the part of it that the compression engine spent on the host.
    """

    text: str
    input_tokens: int
    output_tokens: int
    visual_tokens_in: int
    visual_tokens_kept: float
    seconds: float
    engine_seconds: float


class Runner:
    """Answers batches of conversations with one loaded model."""

    def __init__(self, loaded: Any) -> None:
        """Use the model and processor that `vtc.app.loading.load` returned.

        Raises:
            UnsupportedModel: the processor has no chat template.
        """
        self.loaded = loaded
        self.model = loaded.model
        self.processor = loaded.processor
        self._checked: set[str] = set()  # cells whose method has ranked by numbers once
        if not getattr(self.processor, "chat_template", None):
            raise UnsupportedModel(f"{loaded.name!r} has no chat template, so its prompts cannot be written")

    def prepare(self, conversations: Sequence[Conversation]) -> Batch:
        """Render, tokenise and preprocess `conversations` as one left-padded batch.

        Raises:
            InputError: the processor refuses one; the message names it.
        """
        inputs = prepare(self.loaded, conversations)
        visual = torch.isin(inputs["input_ids"].cpu(), self._visual_token_ids()).sum(1)
        heads = tuple(system_length(self.processor, conversation) for conversation in conversations)
        return Batch(inputs, tuple(visual.tolist()), heads)

    def _visual_token_ids(self) -> Tensor:
        names = ("image_token_id", "video_token_id")
        ids = [getattr(self.model.config, name, None) for name in names]
        return torch.tensor([token_id for token_id in ids if token_id is not None], dtype=torch.long)

    def check(self, cell: Cell) -> Cell:
        """The cell with its position policy resolved.

        Raises:
            VTCError: the method cannot run on this model, or not at this retention.
        """
        if cell.compressor is None:
            return cell
        with self._compressed(cell.compressor, cell) as handle:
            return dataclasses.replace(cell, positions=handle.positions)

    def _compressed(self, compressor: Compressor, cell: Cell) -> vtc.Handle:
        settings: dict[str, Any] = {"positions": cell.positions, "trace": False}
        settings["retention"] = cell.retention if compressor.needs_budget else None  # several together hold theirs
        return vtc.compress(self.model, compressor, processor=self.processor, **settings)

    def sharing(self, cells: Sequence[Cell]) -> SharedEncoder:
        """Inside this context, the images of a batch are encoded by the first of `cells` that answers it."""
        return vtc.share_encoder(self.model, [cell.compressor for cell in cells if cell.compressor is not None])

    def answer(self, batch: Batch, cell: Cell, generation: Generation, *, seed: int = 0) -> list[Answer]:
        """The B answers of `cell`. `seed` is used by sampling only.

        Raises:
            VTCError: the next token was picked by scores that are NaN, or the method ranks by NaN, which is looked for
                in the first batch of each cell.
            Exception: whatever else the method or the model raises; nothing is answered in its place.
        """
        start = time.perf_counter()
        kept: Sequence[float] = batch.visual_tokens
        engine_seconds = 0.0
        if cell.compressor is None:
            new = self._generate(batch, generation, seed)
        else:
            with self._compressed(cell.compressor, cell) as handle, self._checking_once(cell):
                handle.system_length = batch.system_lengths
                new = self._generate(batch, generation, seed)
                if any(batch.visual_tokens):
                    call = handle.stats.calls[-1]
                    kept = _per_prompt(call.visual_tokens_kept, len(batch))
                    engine_seconds = round(call.seconds / len(batch), 6)
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        lengths = self._lengths(new)
        prompt_lengths = batch.inputs["attention_mask"].sum(1).tolist()
        seconds = round((time.perf_counter() - start) / len(batch), 6)
        return [
            Answer(
                generation.cut(text),
                prompt,
                length,
                before,
                round(after, 4),
                round(seconds, 6),
                round(engine_seconds, 6),
            )
            for text, prompt, length, before, after in zip(
                texts, prompt_lengths, lengths, batch.visual_tokens, kept, strict=True
            )
        ]

    @contextlib.contextmanager
    def _checking_once(self, cell: Cell) -> Iterator[None]:
        """Looks for NaN among what the method ranks by, in the first call for `cell` that succeeds."""
        key = cell.key()
        with contextlib.nullcontext() if key in self._checked else checking(cell.label):
            yield
        self._checked.add(key)

    @torch.inference_mode()
    def _generate(self, batch: Batch, generation: Generation, seed: int) -> Tensor:
        """The new token ids, (B, S)."""
        with _seeded(seed, self.model.device) if generation.samples else contextlib.nullcontext():
            logits = FiniteLogits()
            output = self.model.generate(**batch.inputs, **generation.arguments, logits_processor=[logits])
        logits.check(f"{len(batch)} questions")
        new: Tensor = output[:, batch.inputs["input_ids"].shape[1] :]
        if new.shape[0] != len(batch):
            raise InputError(f"{new.shape[0]} answers to {len(batch)} questions; set num_return_sequences to 1")
        return new

    def _lengths(self, new: Tensor) -> list[int]:
        """Generated tokens per answer, the end-of-sequence token included, the padding after it not."""
        ends = self.model.generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        ended = torch.isin(new, torch.tensor(ends, dtype=new.dtype, device=new.device)).int()
        lengths = torch.where(ended.any(1), ended.argmax(1) + 1, new.shape[1])
        return [int(n) for n in lengths.tolist()]


def _per_prompt(values: Sequence[float], prompts: int) -> Sequence[float]:
    """One value per prompt where beams repeat each prompt several times in a row."""
    return values[:: max(1, len(values) // prompts)]


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def few_threads(model: torch.nn.Module) -> Iterator[None]:
    """One torch thread for a small model on the CPU.

    Its matrices are hardly worth splitting, and where a second core is busy with something else, waiting for it after
    every one of them makes answers ten times slower.
    """
    threads = torch.get_num_threads()
    small = sum(parameter.numel() for parameter in model.parameters()) < SMALL
    if small and all(parameter.device.type == "cpu" for parameter in model.parameters()):
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def batch_seed(*parts: object) -> int:
    """A 63-bit seed that depends on `parts` only, the same in every process.

    >>> batch_seed(0, "pope", 24) == batch_seed(0, "pope", 24) != batch_seed(0, "pope", 48)
    True
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8]) >> 1
