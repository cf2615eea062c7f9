"""Qwen2.5-VL: most encoder layers attend inside windows, and the patches travel in window order."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.adapters.qwen import QwenVLAdapter
from vtc.cost.shapes import TowerShape
from vtc.method.base import ModelSpec


class Qwen25VLAdapter(QwenVLAdapter):
    """Qwen2_5_VLForConditionalGeneration; the module tree is that of QwenVLAdapter.

    Hidden states and attention of all encoder layers are in window order. The model puts the merged tokens back, the
    tokens of `to_tokens` are in raster order as well.
    """

    family = "qwen2.5-vl"
    model_classes: ClassVar[tuple[str, ...]] = ("Qwen2_5_VLForConditionalGeneration",)
    references: ClassVar[tuple[ModelSpec, ...]] = (
        ModelSpec(
            "qwen2.5-vl", 32, 31, False, (7, 15, 23, 31), 28, mrope=True, encoder_stages=True, packed=True, joins=True
        ),  # Qwen2.5-VL-7B
    )

    @classmethod
    def tower(cls, vision: Any) -> TowerShape:
        return dataclasses.replace(super().tower(vision), matrices=3, full=tuple(vision.fullatt_block_indexes))

    @classmethod
    def window(cls, vision: Any) -> int | None:
        merge = vision.spatial_merge_size
        return int(vision.window_size // merge // vision.patch_size * merge)

    def full_attention_layers(self, depth: int) -> tuple[int, ...]:
        chosen = self.model.config.vision_config.fullatt_block_indexes
        return tuple(layer for layer in range(depth) if layer in chosen)

    def raster_order(self, grids: Tensor) -> Tensor | None:
        from transformers.vision_utils import get_vision_window_index

        config = self.model.config.vision_config
        merge, window, patch = config.spatial_merge_size, config.window_size, config.patch_size
        index: Tensor = get_vision_window_index(grids, merge, window, patch)[0]
        return torch.argsort(index)
