"""Model families. `of(model)` finds the adapter by class name; families load lazily, so importing this is cheap."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from torch import nn

from vtc.errors import UnsupportedModel

if TYPE_CHECKING:
    from vtc.adapters.base import Adapter

GROUP = "vtc.adapters"

FAMILIES: dict[str, str] = {
    "LlavaForConditionalGeneration": "vtc.adapters.llava:LlavaAdapter",
    "Qwen2VLForConditionalGeneration": "vtc.adapters.qwen2_vl:Qwen2VLAdapter",
    "Qwen2_5_VLForConditionalGeneration": "vtc.adapters.qwen2_5_vl:Qwen25VLAdapter",
    "Qwen3VLForConditionalGeneration": "vtc.adapters.qwen3_vl:Qwen3VLAdapter",
}
"""Model class name -> adapter, as "module:Class"."""


def _entries() -> dict[str, str]:
    third_party = {point.name: point.value for point in entry_points(group=GROUP)}
    return {**third_party, **FAMILIES}


def load(target: str) -> type[Adapter]:
    """Import an adapter class from "module:Class"."""
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def families() -> dict[str, type[Adapter]]:
    """Every family name with its adapter class; third-party packages add theirs through the group `vtc.adapters`."""
    classes = {load(target) for target in _entries().values()}
    return {cls.family: cls for cls in sorted(classes, key=lambda cls: cls.family)}


def supported_classes() -> list[str]:
    """Names of the model classes that have an adapter."""
    return sorted(_entries())


def of(model: nn.Module) -> Adapter:
    """The adapter for `model`, by its class or a base class of it.

    Raises UnsupportedModel that lists the supported classes.
    """
    entries = _entries()
    for cls in type(model).__mro__:
        if cls.__name__ in entries:
            return load(entries[cls.__name__])(model)
    raise UnsupportedModel(
        f"{type(model).__name__} is not supported; supported model classes: {', '.join(supported_classes())}. "
        "Other families can be added by a package with an entry point in the group 'vtc.adapters'"
    )
