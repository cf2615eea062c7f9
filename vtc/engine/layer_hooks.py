"""Hooks on decoder layers: the stages in front of them, what the rows left there need, and rows that skip them."""

from __future__ import annotations

import functools
from collections import deque
from typing import Any

from torch import Tensor, nn

from vtc.adapters.base import Adapter
from vtc.adapters.compat import check_checkpointing
from vtc.engine.deepstack import add_features
from vtc.engine.llm_pass import LLMPass
from vtc.engine.masks import attention_of, group_mask
from vtc.engine.notes import guarded
from vtc.engine.passes import Passes
from vtc.engine.stages import StageRunner
from vtc.method.states import States


class LayerHooks:
    """The hooks of one engine on the decoder layers of its model.

    errors: takes what the hooks raise.
    """

    def __init__(
        self, adapter: Adapter, stages: StageRunner, passes: Passes[LLMPass], errors: deque[Exception]
    ) -> None:
        self._adapter, self._stages = adapter, stages
        self.passes, self.errors = passes, errors
        self._handles: list[Any] = []

    def find(self) -> dict[nn.Module, int]:
        """The layers that need a hook, with their numbers."""
        adapter = self._adapter
        first = min([*self._stages.starts[1:], 1 if adapter.deepstack else len(adapter.layers)])
        # FlashAttention reads gapped position ids as packed sequences: there they are withheld from every layer.
        flash = "flash" in attention_of(adapter.language_model.config)
        return {layer: i for i, layer in enumerate(adapter.layers) if i >= first or flash}

    def install(self, layers: dict[nn.Module, int]) -> None:
        """Place the hooks on what `find` found."""
        for layer, index in layers.items():
            hook = functools.partial(self._enter_layer, index)
            self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
            if index in self._stages.skips:  # in front of hooks that look at what leaves the layer
                self._handles.append(layer.register_forward_hook(self._leave_layer, prepend=True))

    def remove(self) -> None:
        """Take them away; harmless when there are none."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @guarded
    def _enter_layer(self, index: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        one = self.passes.current
        if one is None or not one.conducted:
            return None
        check_checkpointing(module)
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        hidden = add_features(one.features, index, hidden, one.now.rows)
        if index > 0 and index in self._stages.starts:
            one.batch = one.now.to(hidden.device)
            one.rotary = one.rotary if one.group else kwargs["position_embeddings"]
            if one.now.items is not None:
                hidden = self._stages.run(index, one, States(hidden))
            positions, mask = one.enter(index, hidden.device)
            one.mask = group_mask(self._adapter.language_model.config, one, index, mask, hidden)
            one.rotary = self._adapter.language_model.rotary_emb(hidden, positions)
        kwargs["position_ids"] = None  # rotary phases come from position_embeddings; ids only feed packing detection
        if one.group > 0:
            kwargs["attention_mask"], kwargs["position_embeddings"] = one.mask, one.rotary
        if args:
            return (hidden, *args[1:]), kwargs
        kwargs["hidden_states"] = hidden
        return args, kwargs

    @guarded
    def _leave_layer(self, module: Any, args: Any, output: Any) -> Any:
        one = self.passes.current
        if one is None or not one.conducted or one.aside is None:
            return output
        if isinstance(output, tuple):
            return (one.put_back(output[0]), *output[1:])
        return one.put_back(output)
