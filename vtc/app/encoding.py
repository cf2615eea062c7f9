"""Load an image encoder with its text tower by name, on the device it is to run on."""

from __future__ import annotations

import torch

from vtc.adapters.pairs import Encoder, open_pair
from vtc.app.loading import check_device, dtype_of


def load_encoder(
    name: str, *, pretrained: str | None = None, device: str = "auto", dtype: str = "auto", revision: str | None = None
) -> Encoder:
    """Load `name`, see `vtc.adapters.pairs`. device and dtype: as in `vtc.app.loading.load`.

    Raises:
        InputError: nothing can be loaded, or weights are missing.
        UnsupportedModel: no adapter knows the class, or it has no text tower.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device)
    encoder = open_pair(name, pretrained=pretrained, revision=revision)
    number = dtype_of(dtype, device)
    encoder.model.to(device, *([number] if isinstance(number, torch.dtype) else []))
    return encoder
