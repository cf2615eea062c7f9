"""Models to measure: a checkpoint, or a published shape with random weights, cut to the LLM layers that fit.

Time and memory depend on sizes, not on what weights say, so random ones serve; answers mean nothing then.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vtc import adapters
from vtc.app.loading import Loaded, load
from vtc.cost.exact import weights
from vtc.cost.shapes import ModelShape
from vtc.errors import InputError
from vtc.eval.bench.configs import SHAPES, config, family
from vtc.eval.bench.processors import TOKENS, processor

SHARE = 0.6
"""Of the memory that is free, for weights; the rest is for activations and caches."""


@dataclass(frozen=True)
class Subject:
    """A model on its device.

    source: of a shape, where its numbers stand. layers, of: LLM layers that it has, and the whole model has. random:
    its weights are.
    """

    loaded: Loaded
    source: str
    layers: int
    of: int
    random: bool

    @property
    def title(self) -> str:
        """Its name, which says so where layers are missing."""
        name = Path(self.loaded.name).name  # of a folder, wherever it lies
        return name if self.layers == self.of else f"{name}, {self.layers} of {self.of} LLM layers"


def subject(
    name: str, *, layers: int | None, device: str = "auto", dtype: str = "auto", attention: str | None = None
) -> Subject:
    """A checkpoint by name or folder, or a shape of `SHAPES` with random weights.

    layers: LLM layers of a shape; None for as many as fit on the device. Raises InputError for a number of layers that
    a shape does not have, or of a checkpoint, and whatever `vtc.app.loading.load` raises.
    """
    if name not in SHAPES:
        if layers is not None:
            raise InputError(
                f"layers={layers} of {name!r}, which is a checkpoint and measured whole; cut one of {', '.join(SHAPES)}"
            )
        loaded = load(name, device=device, dtype=dtype, attn_implementation=attention)
        count = loaded.model.config.get_text_config().num_hidden_layers
        return Subject(loaded, "", count, count, random=False)
    shape = SHAPES[name]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    number = _dtype(dtype, device)
    count = fitting(shape, number.itemsize, free_bytes(device)) if layers is None else layers
    if not 1 <= count <= shape.llm.layers:
        raise InputError(f"layers={count} of {name!r}, which has {shape.llm.layers}; write 1 to {shape.llm.layers}")
    model = build(shape, count, device=device, dtype=number, attention=attention)
    loaded = Loaded(name, name, model, processor(family(shape), shape, model.config))
    return Subject(loaded, shape.source, count, shape.llm.layers, random=True)


def fitting(shape: ModelShape, element: int, free: float) -> int:
    """The most LLM layers with which the weights take `SHARE` of so many free bytes; element: bytes of a number.

    Raises InputError where not even one fits.
    """
    for layers in range(shape.llm.layers, 0, -1):
        if element * weights(replace(shape, llm=replace(shape.llm, layers=layers))) <= SHARE * free:
            return layers
    raise InputError(
        f"not even one LLM layer of {shape.name!r} fits into {SHARE:.0%} of {free / 1e9:.1f} GB; take a smaller shape, "
        "--dtype bfloat16 or another --device"
    )


def free_bytes(device: str) -> float:
    """Memory of a device that nothing uses."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def build(shape: ModelShape, layers: int, *, device: str, dtype: torch.dtype, attention: str | None = None) -> Any:
    """A model of that shape with `layers` LLM layers and random weights, drawn from a fixed seed."""
    from transformers import AutoModelForImageTextToText

    made = config(replace(shape, llm=replace(shape.llm, layers=layers)))
    options = {} if attention is None else {"attn_implementation": attention}
    try:
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(0)
            model: Any = AutoModelForImageTextToText.from_config(made, dtype=dtype, **options)
    except (ImportError, ValueError) as error:  # an attention backend that is not there
        raise InputError(f"{shape.name!r} cannot be built with attention={attention!r} ({error})") from error
    except torch.OutOfMemoryError as error:
        raise InputError(f"{layers} layers of {shape.name!r} do not fit on {device!r}; give fewer --layers") from error
    model.generation_config.pad_token_id = TOKENS["pad"]
    model.generation_config.eos_token_id = TOKENS["end"]
    adapters.of(model)
    return model.eval()


def _dtype(dtype: str, device: str) -> torch.dtype:
    if dtype == "auto":
        return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"dtype={dtype!r} is no floating-point dtype of torch; write auto, float32 or bfloat16")
    return found
