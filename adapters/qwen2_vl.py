"""Qwen2-VL: every encoder layer attends over a whole frame."""

from __future__ import annotations

from typing import ClassVar

from vtc.adapters.qwen import QwenVLAdapter
from vtc.method.base import ModelSpec


class Qwen2VLAdapter(QwenVLAdapter):
    """Qwen2VLForConditionalGeneration; the module tree is that of QwenVLAdapter."""

    family = "qwen2-vl"
    model_classes: ClassVar[tuple[str, ...]] = ("Qwen2VLForConditionalGeneration",)
    references: ClassVar[tuple[ModelSpec, ...]] = (
        ModelSpec("qwen2-vl", 32, 31, False, tuple(range(32)), 28, mrope=True),  # Qwen2-VL-7B
    )
