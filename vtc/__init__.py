"""Visual-token compression for LLaVA, Qwen-VL and InternVL in unmodified Hugging Face models.

>>> import vtc
>>> "vtc_cls" in vtc.list_methods()
True
"""

from __future__ import annotations

import importlib
import typing

from vtc.app.catalogue import list_methods
from vtc.engine.attach import compress, share_encoder
from vtc.engine.handle import Handle
from vtc.errors import VTCError
from vtc.method.base import (
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
from vtc.method.budget import Budget, tokens_to_keep
from vtc.method.readings import LLMReading, VisionReading
from vtc.method.registry import create, register

if typing.TYPE_CHECKING:
    from vtc import adapters as adapters
    from vtc import testing as testing
    from vtc.app.explore import explore as explore
    from vtc.app.show import show as show
    from vtc.method import learned as learned
    from vtc.method import weights as weights

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
    "explore",
    "list_methods",
    "register",
    "share_encoder",
    "show",
    "tokens_to_keep",
]


_LATER = {
    "adapters": "vtc.adapters",
    "explore": "vtc.app.explore:explore",
    "learned": "vtc.method.learned",
    "show": "vtc.app.show:show",
    "testing": "vtc.testing",
    "weights": "vtc.method.weights",
}
"""What costs time to import, as attributes of the package from their first use on."""


def __getattr__(name: str) -> typing.Any:
    if name in _LATER:
        module, _, member = _LATER[name].partition(":")
        found = importlib.import_module(module)
        return getattr(found, member) if member else found
    raise AttributeError(f"module 'vtc' has no attribute {name!r}")
