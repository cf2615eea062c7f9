"""Which uses of torch.compile compression can be combined with.

Hooks must stay outside the compiled code: `module.forward = torch.compile(module.forward)` keeps them there, while
`module.compile()` and `torch.compile(model)` trace them too, which breaks or, inside the LLM, gives wrong logits.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

from vtc.errors import UnsupportedModel


def _compiled_forward(module: Any) -> bool:
    return hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")


def check_compiled(hooked: Sequence[Any], language_model: Any, *, inside: bool) -> None:
    """Raise UnsupportedModel for modules whose hooks are compiled; warn where compiling does not pay.

    hooked: modules the engine puts hooks on, those around the language model first. inside: the method acts at
    layers inside the LLM.
    """
    for module in hooked:
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise UnsupportedModel(
                f"{type(module).__name__} was compiled with .compile(), which compiles the hooks of the compression as "
                "well; compile the forward method instead: "
                "layer.forward = torch.compile(layer.forward, dynamic=True) for every LLM layer"
            )
    for module in itertools.takewhile(lambda module: module is not language_model, hooked):
        if _compiled_forward(module):
            raise UnsupportedModel(
                f"the forward method of {type(module).__name__} was compiled, and with it the hooks of the compression "
                "on the modules inside; compile the forward method of every LLM layer instead: "
                "layer.forward = torch.compile(layer.forward, dynamic=True)"
            )
    if inside and _compiled_forward(language_model):
        warnings.warn(
            "the language model's forward is compiled as a whole and the method acts inside it: exact, but the graph "
            "breaks at every stage; compile each layer's forward instead",
            stacklevel=4,
        )
