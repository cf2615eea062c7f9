"""Which uses of torch.compile compression can be combined with.

Hooks must stay outside the compiled code: `module.forward = torch.compile(module.forward)` keeps them there, while
`module.compile()` and `torch.compile(model)` trace them too, which breaks or, inside the LLM, gives wrong logits.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from vtc.errors import UnsupportedModel


def check_compiled(hooked: Iterable[Any], language_model: Any, *, inside: bool) -> None:
    """Raise UnsupportedModel for modules whose hooks are compiled; warn where compiling does not pay.

    hooked: modules the engine puts hooks on. inside: the method acts at layers inside the LLM.
    """
    for module in hooked:
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise UnsupportedModel(
                f"{type(module).__name__} was compiled with .compile(), which compiles the hooks of the compression as "
                "well; compile the forward method instead: "
                "layer.forward = torch.compile(layer.forward, dynamic=True) for every LLM layer"
            )
    if inside and hasattr(language_model.__dict__.get("forward"), "_torchdynamo_orig_callable"):
        warnings.warn(
            "the language model's forward is compiled as a whole and the method acts inside it: exact, but the graph "
            "breaks at every stage; compile each layer's forward instead",
            stacklevel=4,
        )
