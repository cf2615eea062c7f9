"""Vision encoders of transformers on their own: CLIP, SigLIP, DINOv2 and ViT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from vtc.adapters.encoder_base import EncoderAdapter
from vtc.adapters.towers import CLIP, DINOV2, SIGLIP, VIT, Tower


class TransformersEncoder(EncoderAdapter):
    """An encoder of transformers, alone or with its text tower.

    model (or model.vision_model, where a text tower or a projection stands beside it)
    ├── embeddings
    ├── layers, as its `Tower` says
    └── what pools: the class token, or an attention head
    """

    tower: ClassVar[Tower]

    def check(self) -> None:
        """Nothing to refuse."""

    @property
    def has_cls(self) -> bool:
        return self.tower.has_cls

    @property
    def encoder(self) -> Any:
        return getattr(self.model, "vision_model", self.model)

    @property
    def vision_layers(self) -> Sequence[nn.Module]:
        return self.tower.layers_of(self.encoder)

    @property
    def vision_attention(self) -> Sequence[nn.Module]:
        return self.tower.attention_of(self.encoder)


class ClipEncoder(TransformersEncoder):
    """CLIPModel and its vision models; the pooled output is the class token."""

    family = "clip"
    model_classes: ClassVar[tuple[str, ...]] = ("CLIPModel", "CLIPVisionModel", "CLIPVisionModelWithProjection")
    tower = CLIP
    is_clip = True

    @property
    def text_layers(self) -> Sequence[nn.Module]:
        return list(self.model.text_model.encoder.layers) if hasattr(self.model, "text_model") else ()

    def project(self, rows: Tensor) -> Tensor:
        if not hasattr(self.model, "visual_projection"):
            return super().project(rows)
        projected: Tensor = self.model.visual_projection(self.encoder.post_layernorm(rows))
        return projected


class SiglipEncoder(TransformersEncoder):
    """SiglipModel and its vision model; the pooled output is a head's attention over the patches."""

    family = "siglip"
    model_classes: ClassVar[tuple[str, ...]] = ("SiglipModel", "SiglipVisionModel")
    tower = SIGLIP

    @property
    def attention_pooled(self) -> bool:
        return True


class Dinov2Encoder(TransformersEncoder):
    """Dinov2Model, with and without register tokens; the pooled output is the class token."""

    family = "dinov2"
    model_classes: ClassVar[tuple[str, ...]] = ("Dinov2Model", "Dinov2WithRegistersModel")
    tower = DINOV2

    def prefix_tokens(self, hidden: Tensor) -> int:
        return 1 + getattr(self.model.config, "num_register_tokens", 0)


class ViTEncoder(TransformersEncoder):
    """ViTModel; the pooled output is made of the class token."""

    family = "vit"
    model_classes: ClassVar[tuple[str, ...]] = ("ViTModel",)
    tower = VIT
