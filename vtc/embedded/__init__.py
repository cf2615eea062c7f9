"""Data that ships with the library: small trained models and learned weights.

`model_path("tiny-llava")` is a folder that `transformers` loads like any other checkpoint. Importing this package is
cheap.
"""

from __future__ import annotations

from pathlib import Path

from vtc.errors import unknown_name

NAMES = ("tiny-llava", "tiny-onevision", "tiny-qwen", "tiny-internvl")
ENCODERS = ("tiny-clip",)
"""Image and text towers without an LLM, which open_clip loads."""
WEIGHTS = Path(__file__).resolve().parent / "weights"
"""Folder of the learned weights."""
MINI_ADAPTER = Path(__file__).resolve().parent / "adapters" / "mini-llava.safetensors"
"""What `vtc mini train` made of mini-llava, the rest of which `vtc mini build` fetches."""


def model_path(name: str) -> Path:
    """Folder of an embedded model; raises `UnknownName` for a name that is not in `NAMES` or `ENCODERS`.

    >>> model_path("tiny-llava").name
    'tiny-llava'
    """
    if name not in NAMES + ENCODERS:
        raise unknown_name("embedded model", name, NAMES + ENCODERS)
    return Path(__file__).resolve().parent / "models" / name
