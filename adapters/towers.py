"""Vision towers of transformers: where each type has its layers, with and without an LLM behind it."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import nn

from vtc.adapters.compat import attention_function_of


@dataclass(frozen=True)
class Tower:
    """Where a type of tower has its parts.

    has_cls: a class token stands in front of the patches. layers: path to the list of layers. attention: path to a
    layer's attention.
    """

    has_cls: bool
    layers: str = "encoder.layers"
    attention: str = "self_attn"

    def layers_of(self, module: Any) -> list[nn.Module]:
        """Layers of the tower `module` in order (it has an inner .vision_model up to transformers 5.17)."""
        return list(attrgetter(self.layers)(getattr(module, "vision_model", module)))

    def attention_of(self, module: Any) -> list[nn.Module]:
        """The module of each layer that looks the attention function up."""
        return [attention_function_of(attrgetter(self.attention)(layer)) for layer in self.layers_of(module)]


CLIP = Tower(has_cls=True)
SIGLIP = Tower(has_cls=False)
DINOV2 = Tower(has_cls=True, layers="encoder.layer", attention="attention")
VIT = Tower(has_cls=True, layers="layers", attention="attention")
