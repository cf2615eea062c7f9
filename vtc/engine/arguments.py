"""What `vtc.compress` and `vtc.share_encoder` are given, checked before anything else is looked at."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import nn

from vtc.engine.installed import every_module
from vtc.errors import UnsupportedModel, VTCError, shown, unknown_name
from vtc.method.base import Compressor, Positions
from vtc.method.hyper_parameters import checked
from vtc.method.registry import METHODS, unknown_parameter


def check_model(model: Any, method: Any = None) -> None:
    """Raise VTCError for what is no loaded model; `method` is what was given beside it."""
    if not isinstance(model, nn.Module):
        name = shown(model)  # a whole model takes milliseconds to print
        if isinstance(method, nn.Module):
            raise VTCError(
                f"{name} stands where the model belongs and a {type(method).__name__} where the method does; write "
                f"vtc.compress(model, {name}, ...)"
            )
        if isinstance(model, type):
            raise UnsupportedModel(f"{name} is a class, no model; load one with {name}.from_pretrained(...)")
        holder = isinstance(getattr(model, "model", None), nn.Module)
        way = "pass its .model" if holder else "pass what from_pretrained(...) of a model class returns"
        raise UnsupportedModel(f"{name} is a {type(model).__name__}, no model; {way}")
    modules = every_module(model)
    weights = (weight for module in modules for weight in module._parameters.values() if weight is not None)
    if any(weight.is_meta for weight in weights) and not any(hasattr(module, "_hf_hook") for module in modules):
        # accelerate's hooks bring the weights
        raise UnsupportedModel(
            f"the weights of this {type(model).__name__} are on the meta device, so nothing can be computed; load them "
            "with from_pretrained(...)"
        )


def check_options(positions: Any, pad_output: Any, trace: Any) -> None:
    """Raise VTCError for options of another type: words count as true in Python, whatever they say."""
    checked("positions", positions, Positions | None, owner="compress")
    checked("pad_output", pad_output, bool, owner="compress")
    checked("trace", trace, bool, owner="compress")


def check_keywords(call: Callable[..., Any], method: Any, given: Collection[str]) -> None:
    """Raise UnknownName for keywords that the named method does not have, or that are slips of `call`'s arguments."""
    arguments = [p.name for p in inspect.signature(call).parameters.values() if p.kind is p.KEYWORD_ONLY]
    fields = METHODS.parameters(method) if isinstance(method, str) else None
    for name in given:
        if fields is None and difflib.get_close_matches(name.lower(), arguments, cutoff=0.75):
            raise unknown_name("argument", name, arguments)
        if fields is not None and name not in fields:
            raise unknown_parameter(method, name, fields, arguments)


def check_methods(methods: Any) -> tuple[Compressor, ...]:
    """The `methods` of `vtc.share_encoder` as a tuple of method objects."""
    given = tuple(methods) if isinstance(methods, Iterable) and not isinstance(methods, str) else (methods,)
    for method in given:
        if not isinstance(method, Compressor):
            raise VTCError(f"methods={shown(methods)} holds {shown(method)}, no method; write [vtc.create('vtc_cls')]")
    return given
