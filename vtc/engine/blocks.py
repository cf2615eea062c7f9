"""Hooks on the blocks of LLM layers: what their attention and their MLP are given, and what they answer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor, nn

from vtc.adapters.base import Adapter
from vtc.engine.installed import Hook
from vtc.method.readings import BlockReading

Record = Callable[[int, BlockReading, int, Tensor, Tensor], None]
"""Takes a layer, a reading, 0 for the attention or 1 for the MLP, and [B, L, D] rows in front of and behind it."""
Weigh = Callable[[Tensor], Tensor]
"""Takes [B, L, D] what an MLP answers, and gives what is added to the rows in its place."""


class BlockHooks:
    """Hooks on the two blocks of the layers of `pairs`, (layer, reading) each, that pass on what goes in and out.

    weighed: layers whose MLP's answer goes through `weigh`, behind its readings. modules: those that carry hooks while
    these are installed.
    """

    def __init__(
        self,
        adapter: Adapter,
        pairs: Sequence[tuple[int, BlockReading]],
        record: Record,
        weighed: Collection[int],
        weigh: Weigh,
    ) -> None:
        blocks: list[Sequence[nn.Module]] = [adapter.llm_attention, adapter.llm_mlp] if pairs else []
        self._places = [
            (modules[layer], Hook(_pass_on, record, layer, reading, block))
            for layer, reading in pairs
            for block, modules in enumerate(blocks)
        ]
        mlps = adapter.llm_mlp if weighed else []
        self._places += [(mlps[layer], Hook(_change, weigh)) for layer in weighed]
        self.modules = tuple(module for module, _ in self._places)
        self._handles: list[Any] = []

    def install(self) -> None:
        """Place the hooks."""
        self._handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in self._places]

    def remove(self) -> None:
        """Take them away; harmless when there are none."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _pass_on(
    record: Record, layer: int, reading: BlockReading, block: int, module: Any, args: Any, kwargs: Any, output: Any
) -> None:
    before = args[0] if args else kwargs["hidden_states"]
    record(layer, reading, block, before, output[0] if isinstance(output, tuple) else output)


def _change(weigh: Weigh, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
    return (weigh(output[0]), *output[1:]) if isinstance(output, tuple) else weigh(output)
