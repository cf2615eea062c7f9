"""Visual-token compression for LLaVA, Qwen-VL and InternVL in unmodified Hugging Face models.

>>> import vtc
>>> "vtc_cls" in vtc.list_methods()
True
"""

from __future__ import annotations

from vtc.attach import Handle, compress, share_encoder
from vtc.budget import Budget, tokens_to_keep
from vtc.compressor import (
    AFTER_PREFILL,
    PRE_LLM,
    CacheStage,
    Compressor,
    EncoderStage,
    ModelSpec,
    Needs,
    Plan,
    Rows,
    ScoringCompressor,
    Selection,
    StageView,
)
from vtc.errors import VTCError
from vtc.readings import LLMReading, VisionReading
from vtc.registry import create, list_methods, register

__version__ = "0.1.0"

__all__ = [
    "AFTER_PREFILL",
    "PRE_LLM",
    "Budget",
    "CacheStage",
    "Compressor",
    "EncoderStage",
    "Handle",
    "LLMReading",
    "ModelSpec",
    "Needs",
    "Plan",
    "Rows",
    "ScoringCompressor",
    "Selection",
    "StageView",
    "VTCError",
    "VisionReading",
    "compress",
    "create",
    "list_methods",
    "register",
    "share_encoder",
    "tokens_to_keep",
]
