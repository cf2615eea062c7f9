"""Qwen2-VL: every encoder layer attends over a whole frame."""

from __future__ import annotations

from typing import Any, ClassVar

from vtc.adapters.qwen import QwenVLAdapter
from vtc.cost.shapes import TowerShape
from vtc.method.base import ModelSpec


class Qwen2VLAdapter(QwenVLAdapter):
    """Qwen2VLForConditionalGeneration; the module tree is that of QwenVLAdapter."""

    family = "qwen2-vl"
    model_classes: ClassVar[tuple[str, ...]] = ("Qwen2VLForConditionalGeneration",)
    references: ClassVar[tuple[ModelSpec, ...]] = (
        ModelSpec(
            "qwen2-vl", 32, 31, False, tuple(range(32)), 28, mrope=True, encoder_stages=True, packed=True, joins=True
        ),  # Qwen2-VL-7B
    )

    @classmethod
    def tower(cls, vision: Any) -> TowerShape:
        patch = vision.temporal_patch_size * vision.in_channels * vision.patch_size**2
        inner = int(vision.embed_dim * vision.mlp_ratio)
        return TowerShape(vision.embed_dim, inner, vision.depth, vision.embed_dim, patch)
