"""What the trainer must know about a model class: how it is built, what it reads and where its visual cells look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vtc.eval.tiny.batches import PIXEL_MEAN, PIXEL_STD
from vtc.eval.tiny.canvas import Box
from vtc.eval.tiny.sample import Media
from vtc.eval.tiny.vocabulary import BEGIN, END, EXTENDED, IMAGE, PAD, TOKEN, VIDEO, VISION_END, VISION_START

SPECIAL = (VIDEO, VISION_START, VISION_END)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}ASSISTANT: {% else %}USER: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }} "
    "{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}@IMAGE@\n{% elif part['type'] == 'video' %}@VIDEO@\n"
    "{% elif part['type'] == 'text' %}{{ part['text'] }} {% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


class Recorder:
    """Takes down what a module reads or writes while it is entered."""

    def __init__(self, module: Any, *, output: bool = False) -> None:
        self.value: Any = None
        self._module, self._output = module, output

    def __enter__(self) -> Recorder:
        def note(module: Any, args: tuple[Any, ...], result: Any) -> None:
            self.value = result if self._output else args[0]

        self._hook = self._module.register_forward_hook(note)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()


def chat_template(image: str = IMAGE, video: str = VIDEO) -> str:
    """LLaVA-1.5's template with placeholders where the message has pictures or clips."""
    return CHAT_TEMPLATE.replace("@IMAGE@", image).replace("@VIDEO@", video)


def text_settings(hidden: int, inner: int, layers: int, heads: int, key_heads: int) -> dict[str, Any]:
    """What the configurations of all language models here have in common."""
    return {
        "vocab_size": len(EXTENDED),
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": TOKEN[BEGIN],
        "eos_token_id": TOKEN[END],
        "pad_token_id": TOKEN[PAD],
    }


def with_generation_settings(model: Any) -> Any:
    """The model, which knows now how answers begin and end."""
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id = TOKEN[BEGIN], TOKEN[END]
    generation.pad_token_id = TOKEN[PAD]
    return model


@dataclass(frozen=True)
class View:
    """A part of one or several pictures, in their pixels, that the tower sees as rows and columns of cells."""

    pictures: tuple[int, ...]
    box: Box
    rows: int
    columns: int


@dataclass(frozen=True)
class Seen:
    """What a tower made of a batch.

    Embeddings for the placeholders, (placeholders, hidden) in reading order, and what the auxiliary heads read: cells
    (views, cells, width), the views of the first sample first, and class tokens (views, hidden) if the tower has them.
    """

    tokens: Tensor
    cells: Tensor
    classes: Tensor | None = None


class Family(Protocol):
    """One model class."""

    grid: int  # cells per side of a view, all of which are square; 0 for a tower without absolute positions
    hidden: int  # width of class tokens, where there are any
    has_classes: bool
    media: tuple[Media, ...]  # what the class reads

    @property
    def width(self) -> int:
        """Width of the cells."""

    def build(self, attention: str) -> Any:
        """The model with fresh weights from torch's global generator."""

    def tower(self, model: Any) -> Any:
        """The vision tower of a model."""

    def layers(self, model: Any) -> Any:
        """The layers of the tower."""

    def speed_up(self, model: Any) -> None:
        """Replace what is slow in training by the same calculation; nothing of it is exported."""

    def processor(self) -> Any:
        """Tokenizer, image and video processor and chat template."""

    def views(self, media: Media, count: int, size: tuple[int, int]) -> list[View]:
        """The views of `count` pictures or frames of a size (height, width), in the order of `Seen.cells`."""

    def see(self, model: Any, media: Media, inputs: dict[str, Tensor]) -> Seen:
        """Run tower and projector on what the processor made of a batch."""

    def positions(self, model: Any, ids: Tensor, media: Media, inputs: dict[str, Tensor], offsets: Tensor) -> Tensor:
        """Positions of a prefix `ids` (1, P) and of text tokens at `offsets` (T,) of their slots, (..., 1, P + T)."""


def pixel_settings(side: int) -> dict[str, Any]:
    """What image and video processors are told of pictures of `side` px and of their normalisation."""
    return {"image_mean": list(PIXEL_MEAN), "image_std": list(PIXEL_STD), "size": {"height": side, "width": side}}


def counted(prefix: int, offsets: Tensor) -> Tensor:
    """Positions (1, prefix + T) of a prefix and of text tokens at `offsets` (T,) of their slots, as one count."""
    return torch.cat([torch.arange(prefix), prefix + offsets])[None]


def media_inputs(processor: Any, media: Media, pictures: NDArray[np.uint8]) -> dict[str, Tensor]:
    """Model inputs for (B, N, H, W, 3) pictures: single ones, several per prompt, or clips of N frames."""
    channels_first = torch.from_numpy(pictures).permute(0, 1, 4, 2, 3)
    if media == "video":
        return dict(processor.video_processor(list(channels_first), return_tensors="pt"))
    images: Sequence[Any] = [list(sample) for sample in channels_first]
    return dict(processor.image_processor(images, return_tensors="pt"))


def prompt(processor: Any, media: Media, count: int, text: str) -> str:
    """The chat prompt of a question about `count` pictures or about one clip."""
    content = [{"type": "video"}] if media == "video" else [{"type": "image"}] * count
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
    made: str = processor.apply_chat_template(messages, add_generation_prompt=True)
    return made


def encoded(processor: Any, media: Media, pictures: Sequence[NDArray[np.uint8]], texts: Sequence[str]) -> Any:
    """Everything that `generate` takes for one question about each of several samples (N, H, W, 3)."""
    prompts = [prompt(processor, media, len(frames), text) for frames, text in zip(pictures, texts, strict=True)]
    tensors = [torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2) for frames in pictures]
    if media == "video":
        return processor(text=prompts, videos=tensors, return_tensors="pt", padding=True)
    return processor(text=prompts, images=[list(frames) for frames in tensors], return_tensors="pt", padding=True)


def prefix_ids(processor: Any, media: Media, pictures: NDArray[np.uint8]) -> Tensor:
    """Token ids of the prompt in front of the question for a sample (N, H, W, 3), (1, P)."""
    ids: Tensor = encoded(processor, media, [pictures], ["?"])["input_ids"]
    return ids[:, :-2]  # without the question mark and ASSISTANT:
