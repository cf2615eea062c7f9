"""Tools to test methods and adapters, for this library and for third-party packages.

`tiny_model` and `tiny_inputs` build random models of every supported family in milliseconds, `Oracle` turns the
untouched model into the reference for pruning, `check_method` and `check_adapter` run the whole contract. `make_view`
makes views of items of any size without a model.
"""

from __future__ import annotations

from vtc.testing.contract import Deviation, check_adapter, check_method
from vtc.testing.models import TINY_MODELS, tiny_inputs, tiny_model
from vtc.testing.oracle import Oracle
from vtc.testing.probes import FixedKeep, LastRowTopK
from vtc.testing.snapshot import snapshot
from vtc.testing.views import Shape, make_view

__all__ = [
    "TINY_MODELS",
    "Deviation",
    "FixedKeep",
    "LastRowTopK",
    "Oracle",
    "Shape",
    "check_adapter",
    "check_method",
    "make_view",
    "snapshot",
    "tiny_inputs",
    "tiny_model",
]
