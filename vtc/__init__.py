"""Visual-token compression for LLaVA, Qwen-VL and InternVL in unmodified Hugging Face models.

>>> import vtc
>>> "vtc_cls" in vtc.list_methods()
True
"""

from __future__ import annotations

import importlib
import typing

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

if typing.TYPE_CHECKING:
    from vtc import adapters as adapters
    from vtc import learned as learned
    from vtc import testing as testing
    from vtc import weights as weights

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


def __getattr__(name: str) -> typing.Any:
    """Parts that cost time to import are there as attributes as well, from their first use on."""
    if name in ("adapters", "learned", "testing", "weights"):
        return importlib.import_module(f"vtc.{name}")
    raise AttributeError(f"module 'vtc' has no attribute {name!r}")
