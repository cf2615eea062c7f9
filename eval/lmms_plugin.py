"""Entry point of group ``lmms_eval.models``: makes ``python -m lmms_eval --model vtc`` work.

Loaded by lmms-eval while its model registry is being imported, hence no import here but the manifest class.
"""

from __future__ import annotations

from typing import Any


def manifests() -> list[Any]:
    """The models that this package adds to lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    paths = {"chat_class_path": "vtc.eval.lmms_model.VTC", "simple_class_path": "vtc.eval.lmms_simple.SimpleVTC"}
    return [ModelManifest(model_id="vtc", **paths)]
