"""Model families. `of(model)` finds the adapter by class name; families load lazily, so importing this is cheap."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from torch import nn

from vtc.errors import UnsupportedModel

if TYPE_CHECKING:
    from vtc.adapters.base import Adapter
    from vtc.adapters.encoder_base import EncoderAdapter
    from vtc.cost.shapes import ModelShape

GROUP = "vtc.adapters"

FAMILIES: dict[str, str] = {
    "LlavaForConditionalGeneration": "vtc.adapters.llava:LlavaAdapter",
    "LlavaNextForConditionalGeneration": "vtc.adapters.llava_next:LlavaNextAdapter",
    "LlavaNextVideoForConditionalGeneration": "vtc.adapters.llava_next_video:LlavaNextVideoAdapter",
    "LlavaOnevisionForConditionalGeneration": "vtc.adapters.llava_onevision:LlavaOnevisionAdapter",
    "InternVLForConditionalGeneration": "vtc.adapters.internvl:InternVLAdapter",
    "Qwen2VLForConditionalGeneration": "vtc.adapters.qwen2_vl:Qwen2VLAdapter",
    "Qwen2_5_VLForConditionalGeneration": "vtc.adapters.qwen2_5_vl:Qwen25VLAdapter",
    "Qwen3VLForConditionalGeneration": "vtc.adapters.qwen3_vl:Qwen3VLAdapter",
    "Qwen3VLMoeForConditionalGeneration": "vtc.adapters.qwen3_vl:Qwen3VLAdapter",
}
"""Model class name -> adapter, as "module:Class"."""

ENCODERS: dict[str, str] = {
    "transformers.CLIPModel": "vtc.adapters.encoders:ClipEncoder",
    "transformers.CLIPVisionModel": "vtc.adapters.encoders:ClipEncoder",
    "transformers.CLIPVisionModelWithProjection": "vtc.adapters.encoders:ClipEncoder",
    "transformers.SiglipModel": "vtc.adapters.encoders:SiglipEncoder",
    "transformers.SiglipVisionModel": "vtc.adapters.encoders:SiglipEncoder",
    "transformers.Dinov2Model": "vtc.adapters.encoders:Dinov2Encoder",
    "transformers.Dinov2WithRegistersModel": "vtc.adapters.encoders:Dinov2Encoder",
    "transformers.ViTModel": "vtc.adapters.encoders:ViTEncoder",
    "timm.VisionTransformer": "vtc.adapters.timm:TimmEncoder",
    "open_clip.CLIP": "vtc.adapters.open_clip:OpenClipEncoder",
    "open_clip.CustomTextCLIP": "vtc.adapters.open_clip:OpenClipEncoder",
}
"""Package and class name of vision encoders without an LLM behind them -> adapter, as "module:Class"."""


def _entries() -> dict[str, str]:
    third_party = {point.name: point.value for point in entry_points(group=GROUP)}
    return {**third_party, **FAMILIES}


def load(target: str) -> type[Adapter]:
    """Import an adapter class from "module:Class"."""
    return _load(target)  # type: ignore[no-any-return]


def _load(target: str) -> Any:
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


def families() -> dict[str, type[Adapter]]:
    """Every family name with its adapter class; third-party packages add theirs through the group `vtc.adapters`."""
    classes = {load(target) for target in _entries().values()}
    return {cls.family: cls for cls in sorted(classes, key=lambda cls: cls.family)}


def encoder_families() -> dict[str, type[EncoderAdapter]]:
    """The same of vision encoders without an LLM behind them."""
    classes = {_load(target) for target in ENCODERS.values()}
    return {cls.family: cls for cls in sorted(classes, key=lambda cls: cls.family)}


def supported_classes() -> list[str]:
    """Names of the model classes that have an adapter."""
    return sorted(_entries())


def encoder_of(model: nn.Module) -> EncoderAdapter | None:
    """The adapter of a vision encoder without an LLM behind it, by its class or a base class; None for other models.

    A PEFT wrapper stands for the model inside it.
    """
    for cls in type(model).__mro__:
        name = f"{cls.__module__.partition('.')[0]}.{cls.__name__}"
        if name in ENCODERS:
            return _load(ENCODERS[name]).of(model)  # type: ignore[no-any-return]
    unwrap = getattr(model, "get_base_model", None)
    return encoder_of(unwrap()) if callable(unwrap) else None


def shape_of(config: Any) -> ModelShape:
    """The sizes of a model with this Hugging Face configuration, which its cost depends on.

    Raises UnsupportedModel for a class without an adapter, or one whose adapter tells no sizes.
    """
    classes, entries = list(getattr(config, "architectures", None) or []), _entries()
    known = [name for name in classes if name in entries]
    if not known:
        raise UnsupportedModel(
            f"{', '.join(classes) or 'a configuration without architectures'} is not supported; supported model "
            f"classes: {', '.join(supported_classes())}"
        )
    return load(entries[known[0]]).shape(config)


def of(model: nn.Module) -> Adapter:
    """The adapter for `model`, by its class or a base class of it; a PEFT wrapper stands for the model inside it.

    Raises UnsupportedModel that lists the supported classes.
    """
    if type(model).__name__ in FAMILIES:  # looking for the entry points of installed packages takes milliseconds
        return load(FAMILIES[type(model).__name__])(model)
    if (encoder := encoder_of(model)) is not None:
        raise UnsupportedModel(
            f"{type(encoder.model).__name__} is a vision encoder without an LLM, which only vtc.compress takes; give a "
            "multimodal LLM here"
        )
    entries = _entries()
    unwrap = getattr(model, "get_base_model", None)
    if callable(unwrap) and type(model).__name__ not in entries:
        return of(unwrap())
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModel(
            "torch.compile(model) compiles the hooks of the compression as well; keep the model as it is and compile "
            "the forward method of every LLM layer: layer.forward = torch.compile(layer.forward, dynamic=True)"
        )
    for cls in type(model).__mro__:
        if cls.__name__ in entries:
            return load(entries[cls.__name__])(model)
    raise UnsupportedModel(
        f"{type(model).__name__} is not supported; supported model classes: {', '.join(supported_classes())}; "
        f"encoders without an LLM: {', '.join(ENCODERS)}. Other families can be added by a package with "
        "an entry point in the group 'vtc.adapters'"
    )
