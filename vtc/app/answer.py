"""Ask one question about some images and videos: the smallest complete path from files to text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from vtc import adapters
from vtc.app.images import open_image
from vtc.app.loading import Loaded
from vtc.app.nonsense import FiniteLogits, checking
from vtc.app.preparation import Chat, on_device, prepare
from vtc.app.template import system_length
from vtc.engine.attach import compress
from vtc.method.base import Compressor

if TYPE_CHECKING:
    from vtc.app.media import Video

__all__ = ["Answer", "answer", "open_image"]


@dataclass(frozen=True)
class Answer:
    """A generated text. Visual tokens are those of the whole prompt; kept is the mean over the LLM layers."""

    text: str
    visual_tokens_in: int
    visual_tokens_kept: float
    prompt_tokens: int
    seconds: float


@torch.inference_mode()
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
    model, processor = loaded.model, loaded.processor
    media = [{"type": "image", "image": image} for image in images] + [{"type": "video", "video": v} for v in videos]
    content = [*media, {"type": "text", "text": prompt}]
    chat = Chat([{"role": "user", "content": content}])
    inputs = prepare(loaded, [chat])
    attached = None
    if method is not None:
        options = {"system_length": system_length(processor, chat), "processor": processor, **options}
        attached = compress(model, method, retention=retention, keep=keep, **options)
    start = time.perf_counter()
    logits = FiniteLogits()
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False, "logits_processor": [logits]}
    with attached or nullcontext(), checking(getattr(method, "name", str(method))):
        ids = on_device(model, lambda: model.generate(**inputs, **settings))
    logits.check("the question")
    seconds = time.perf_counter() - start
    length = inputs["input_ids"].shape[1]
    reply = processor.batch_decode(ids[:, length:], skip_special_tokens=True)[0].strip()
    tokens = torch.tensor(list(adapters.of(model).placeholders.values()), device=inputs["input_ids"].device)
    before = int(torch.isin(inputs["input_ids"], tokens).sum())
    kept = attached.stats.visual_tokens_kept if attached is not None else float(before)
    return Answer(reply, before, kept, length, seconds)
