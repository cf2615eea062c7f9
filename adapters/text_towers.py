"""Text towers of open_clip's models, its own and those of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def text_layers(model: Any) -> Sequence[nn.Module]:
    """Layers of the text tower of `model`; none where it has no such tower.

    open_clip's CLIP holds its text transformer itself, CustomTextCLIP under `text`, where it may be a model of
    transformers that names its layers as it likes: they are the longest list in it.
    """
    if not hasattr(model, "visual"):
        return ()
    tower = getattr(model, "text", model).transformer
    return max((list(part) for part in tower.modules() if isinstance(part, nn.ModuleList)), key=len)
