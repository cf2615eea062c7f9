"""The one path from conversations to answers: template, processor, `model.generate` under a method or not, text.

`vtc generate` asks one question through `answer`; sweeps, lmms-eval and measurements of trainings use `Answerer`. A
batch is prepared once and may be answered many times.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from vtc import adapters
from vtc.adapters.placement import device_of
from vtc.app.costs import CostMeter
from vtc.app.images import open_image
from vtc.app.loading import Loaded
from vtc.app.nonsense import FiniteLogits, checking
from vtc.app.preparation import Chat, asked, moved, on_device, preprocess
from vtc.app.template import system_lengths
from vtc.cost.exact import Work
from vtc.engine.attach import compress
from vtc.engine.handle import Handle
from vtc.errors import InputError
from vtc.method.base import Compressor

if TYPE_CHECKING:
    from vtc.app.media import Video

__all__ = ["Answer", "Answerer", "Batch", "answer", "open_image"]


@dataclass(frozen=True)
class Batch:
    """Inputs of B prompts, left-padded, on the model's device unless it is told otherwise.

    `visual_tokens` (B) counts their placeholders, `system_lengths` (B) the tokens in front of the user's words. `works`
    (B) is what the untouched model does for each, None where its family tells no sizes; `full` (B) the same of the
    prompts that shares of costs refer to, where these are others. `image_sizes` are height and width of every picture,
    `questions` (B) what the user wrote.
    """

    inputs: Mapping[str, Any]
    visual_tokens: tuple[int, ...]
    system_lengths: tuple[int, ...] | None = None
    works: tuple[Work, ...] | None = None
    full: tuple[Work, ...] | None = None
    image_sizes: tuple[tuple[int, int], ...] | None = None
    questions: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.visual_tokens)

    def tell(self, handle: Handle) -> None:
        """Say to an attached method what the inputs do not show."""
        handle.system_length, handle.image_sizes = self.system_lengths, self.image_sizes
        handle.questions = self.questions


@dataclass(frozen=True)
class Answer:
    """One answer and what it cost.

    `input_tokens` is the prompt's length before compression. `visual_tokens_kept` is the mean, over the layers of the
    language model, of the visual tokens that enter the layer; `layer_tokens` are these, as spans of so many layers with
    so many tokens. `seconds` is this answer's share of the batch's generate time, `engine_seconds` the part of it that
    the compression engine spent on the host. `flops` are the operations of the prefill as `vtc.cost.exact` counts them,
    `kv_bytes` the cache at its end, padding left out of both, and the shares are those of the untouched model's; None
    where the model's family tells no sizes.
    """

    text: str
    input_tokens: int
    output_tokens: int
    visual_tokens_in: int
    visual_tokens_kept: float
    seconds: float
    engine_seconds: float
    layer_tokens: tuple[tuple[int, float], ...] = ()
    flops: float | None = None
    flops_share: float | None = None
    kv_bytes: float | None = None
    kv_share: float | None = None


class Answerer:
    """Answers batches of conversations with one loaded model."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self.model = loaded.model
        self.processor = loaded.processor

    @functools.cached_property
    def meter(self) -> CostMeter:
        """What tells costs on this model."""
        return CostMeter(self.model)

    def prepare(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> Batch:
        """Render, tokenise and preprocess `conversations` as one left-padded batch.

        Raises:
            InputError: what `vtc.app.preparation.prepare` refuses; the message names the conversation.
        """
        return self.moved(self.preprocess(conversations))

    def moved(self, batch: Batch) -> Batch:
        """The batch on the model's device; InputError where it finds no room there."""
        return dataclasses.replace(batch, inputs=moved(self.model, batch.inputs))

    def preprocess(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> Batch:
        """`prepare` but for the device: inputs on the CPU, made while another thread may use the model."""
        inputs, sizes = preprocess(self.loaded, conversations)
        placeholders = torch.tensor(list(adapters.of(self.model).placeholders.values()), dtype=torch.long)
        visual = torch.isin(inputs["input_ids"], placeholders).sum(1)
        with self.loaded.processing:
            heads = system_lengths(self.processor, conversations)
        tokens = tuple(visual.tolist())
        text = [length - n for length, n in zip(inputs["attention_mask"].sum(1).tolist(), tokens, strict=True)]
        works = self.meter.untouched(inputs, tokens, text)
        return Batch(inputs, tokens, heads, works, image_sizes=tuple(sizes), questions=tuple(map(asked, conversations)))

    def compressed(self, method: str | Compressor, **settings: Any) -> Handle:
        """`vtc.compress` with this model and processor; a context that ends it. No trace unless `trace` asks for one.

        Raises:
            VTCError: the method cannot run on this model, or not with these settings.
        """
        return compress(self.model, method, processor=self.processor, **{"trace": False, **settings})

    @torch.inference_mode()
    def generate(
        self,
        batch: Batch,
        arguments: Mapping[str, Any],
        handle: Handle | None = None,
        *,
        seed: int | None = None,
        blame: str | None = None,
    ) -> list[Answer]:
        """The B answers of the model as it is, which `handle` from `compressed` is attached to, or nothing.

        arguments: of `model.generate`. seed: for sampling; the global generator stays as it was. blame: look for NaN
        among what the method ranks by, and name it so; every ranking then waits for the device.

        Raises:
            InputError: the device has no room for the batch, or `arguments` ask for several answers to one prompt.
            VTCError: the next token was picked by scores that are NaN, or the method ranks by NaN.
            Exception: whatever else the method or the model raises; nothing is answered in its place.
        """
        start = time.perf_counter()
        if handle is not None:
            batch.tell(handle)
        logits = FiniteLogits()
        sampling = contextlib.nullcontext() if seed is None else _seeded(seed, device_of(self.model))
        with sampling, contextlib.nullcontext() if blame is None else checking(blame):
            output = on_device(
                self.model, lambda: self.model.generate(**batch.inputs, **arguments, logits_processor=[logits])
            )
        logits.check("the question" if len(batch) == 1 else f"{len(batch)} questions")
        new: Tensor = output[:, batch.inputs["input_ids"].shape[1] :]
        if new.shape[0] != len(batch):
            raise InputError(f"{new.shape[0]} answers to {len(batch)} questions; set num_return_sequences to 1")
        kept: Sequence[float] = batch.visual_tokens
        engine_seconds = 0.0
        if handle is not None and any(batch.visual_tokens):
            call = handle.stats.calls[-1]
            kept = call.visual_tokens_kept[:: max(1, call.batch // len(batch))]  # beams repeat prompts
            engine_seconds = round(call.seconds / len(batch), 6)
        with self.loaded.processing:
            texts = self.processor.batch_decode(new, skip_special_tokens=True)
        prompt_lengths = batch.inputs["attention_mask"].sum(1).tolist()
        seconds = round((time.perf_counter() - start) / len(batch), 6)
        columns = zip(texts, prompt_lengths, self._lengths(new), batch.visual_tokens, kept, strict=True)
        return [
            Answer(text, prompt, length, before, round(float(after), 4), seconds, engine_seconds, **spent)
            for (text, prompt, length, before, after), spent in zip(columns, self.spent(batch, handle), strict=True)
        ]

    def spent(self, batch: Batch, handle: Handle | None) -> list[dict[str, Any]]:
        """The fields of an `Answer` about costs for each question of a batch that has just been run under `handle`."""
        if batch.works is None:
            return [{}] * len(batch)
        works = batch.works
        if handle is not None and any(batch.visual_tokens):
            works = self.meter.compressed(works, handle, handle.stats.calls[-1])
        return self.meter.spent(batch.full or batch.works, works)

    def _lengths(self, new: Tensor) -> list[int]:
        """Generated tokens per answer, the end-of-sequence token included, the padding after it not."""
        ends = self.model.generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        ended = torch.isin(new, torch.tensor(ends, dtype=new.dtype, device=new.device)).int()
        lengths = torch.where(ended.any(1), ended.argmax(1) + 1, new.shape[1])
        return [int(n) for n in lengths.tolist()]


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def answer(
    loaded: Loaded,
    images: Sequence[Image.Image],
    prompt: str,
    *,
    videos: Sequence[Video] = (),
    method: str | Compressor | None = None,
    retention: float | None = None,
    keep: int | None = None,
    max_new_tokens: int = 128,
    **options: Any,
) -> Answer:
    """Answer `prompt` about `images` and `videos`, greedily; method None runs the untouched model.

    videos: decoded clips, see `vtc.app.media.read_video`. options: further arguments of `vtc.compress`, with
    hyper-parameters. Raises InputError for what the model's processor refuses, see `vtc.app.preparation`, and VTCError
    where the model or the method computes NaN.
    """
    answerer = Answerer(loaded)
    media = [{"type": "image", "image": image} for image in images] + [{"type": "video", "video": v} for v in videos]
    batch = answerer.prepare([Chat([{"role": "user", "content": [*media, {"type": "text", "text": prompt}]}])])
    told = {"system_lengths": "system_length", "image_sizes": "image_sizes", "questions": "questions"}
    given = {field: options.pop(name) for field, name in told.items() if name in options}
    batch = dataclasses.replace(batch, **given)
    arguments = {"max_new_tokens": max_new_tokens, "do_sample": False}
    if method is None:
        (reply,) = answerer.generate(batch, arguments)
    else:
        with answerer.compressed(method, retention=retention, keep=keep, **options) as handle:
            (reply,) = answerer.generate(batch, arguments, handle, blame=getattr(method, "name", str(method)))
    return dataclasses.replace(reply, text=reply.text.strip())
