"""Ask one question about some images and videos: the smallest complete path from files to text."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, UnidentifiedImageError

from vtc import adapters
from vtc.attach import compress
from vtc.compressor import Compressor
from vtc.errors import InputError
from vtc.loading import Loaded

if TYPE_CHECKING:
    from vtc.eval.media import Video


@dataclass(frozen=True)
class Answer:
    """A generated text. Visual tokens are those of the whole prompt; kept is the mean over the LLM layers."""

    text: str
    visual_tokens_in: int
    visual_tokens_kept: float
    prompt_tokens: int
    seconds: float


def open_image(path: str | Path) -> Image.Image:
    """Read an image file as RGB; InputError for a missing or broken one."""
    file = Path(path)
    if not file.is_file():
        raise InputError(f"image {str(path)!r} does not exist; give the path of an image file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(file).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"image {str(path)!r} cannot be read ({error}); give a PNG, JPEG or WebP file") from error
    except Image.DecompressionBombWarning as error:
        raise InputError(f"image {str(path)!r} is too large ({error}); scale it down first") from error


def prompt_text(processor: Any, prompt: str, images: int, videos: int = 0) -> str:
    """The prompt in the checkpoint's chat template, media first; without a template, placeholders and the prompt."""
    if getattr(processor, "chat_template", None):
        media = [{"type": "image"}] * images + [{"type": "video"}] * videos
        content = [*media, {"type": "text", "text": prompt}]
        chat = [{"role": "user", "content": content}]
        text: str = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return text
    return f"{processor.image_token}\n" * images + (f"{processor.video_token}\n" * videos if videos else "") + prompt


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

    videos: decoded clips, see `vtc.eval.media.read_video`. options: further arguments of `vtc.compress`, with
    hyper-parameters.
    """
    model, processor = loaded.model, loaded.processor
    adapter = adapters.of(model)
    if videos and "video" not in adapter.modalities:
        raise InputError(f"{adapter.family} models take no video; give images, or a model of another family")
    text = prompt_text(processor, prompt, len(images), len(videos))
    # Nested by prompt: a flat list would count as one image per prompt where tiling depends on that.
    media: dict[str, Any] = {"images": [list(images)]} if images else {}
    if videos:
        metadata = [video.metadata() for video in videos]
        media["videos"] = [video.frames for video in videos]
        media["videos_kwargs"] = {"do_sample_frames": False, "video_metadata": metadata}
    inputs = processor(text=[text], **media, return_tensors="pt").to(model.device, model.dtype)
    attached = None
    if method is not None:
        attached = compress(model, method, retention=retention, keep=keep, **options)
    start = time.perf_counter()
    with attached or nullcontext():
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    seconds = time.perf_counter() - start
    length = inputs["input_ids"].shape[1]
    reply = processor.batch_decode(ids[:, length:], skip_special_tokens=True)[0].strip()
    tokens = torch.tensor(list(adapter.placeholders.values()), device=inputs["input_ids"].device)
    before = int(torch.isin(inputs["input_ids"], tokens).sum())
    kept = attached.stats.visual_tokens_kept if attached is not None else float(before)
    return Answer(reply, before, kept, length, seconds)
