"""Encoder stages in front of an LLM: the projected features get the places of their patches back.

The encoder shortens, the projector's output is spread over the original raster again (zeros where a patch was
dropped), so that every family's packing code sees the number of patches it expects; the engine drops the empty rows
before the LLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtc.batch.context import VisionContext
from vtc.engine.encoder_pass import EncoderPass
from vtc.engine.encoder_stages import EncoderStages, spread
from vtc.engine.installed import Hook
from vtc.errors import UnsupportedMethod
from vtc.method.base import Compressor, Plan
from vtc.method.budget import Budget
from vtc.method.layout import Kind

if TYPE_CHECKING:
    from vtc.adapters.base import Adapter


class TowerStages(EncoderStages):
    """Encoder stages of a multimodal LLM; the last of them may lie behind the feature layer, before the projector."""

    adapter: Adapter

    def __init__(
        self,
        adapter: Adapter,
        method: Compressor,
        plan: Plan,
        budget: Budget | None,
        module: nn.Module | None,
    ) -> None:
        if adapter.packed:
            raise UnsupportedMethod(
                f"{method.name!r} removes patches inside the vision encoder; {adapter.family} encodes all items as one "
                "packed sequence and merges groups of neighbouring patches, which stages inside the encoder do not "
                "support. Choose a method that acts before or inside the LLM"
            )
        self._whole = plan.units and adapter.spec.unit > 0
        if adapter.joined >= set(adapter.modalities) and not self._whole:
            raise UnsupportedMethod(self._joined(adapter, method, "image"))
        super().__init__(adapter, method, plan, budget, module)

    def _install_end(self) -> None:
        if self._whole:  # the model joins patches by their places: all have to be there behind the last layer
            last = self.adapter.vision_layers[self._behind - 1]
            self._handles.append(last.register_forward_hook(Hook(self._fill_up)))
            return
        projector = self.adapter.projector
        if self._behind in self.stages:
            self._handles.append(projector.register_forward_pre_hook(Hook(self._before_projector)))
        self._handles.append(projector.register_forward_hook(Hook(self._spread)))

    def check(self, kind: Kind) -> None:
        """Refuse modalities in which removing single patches has no meaning."""
        if kind in self.adapter.joined and not self._whole:
            raise UnsupportedMethod(self._joined(self.adapter, self.method, kind))

    @staticmethod
    def _joined(adapter: Adapter, method: Compressor, kind: Kind) -> str:
        return (
            f"{method.name!r} removes patches inside the vision encoder; {adapter.family} makes each {kind} token of "
            "several patches, so stages inside it are not supported. Choose a method that acts before or inside the LLM"
        )

    def alive(self, one: EncoderPass, context: VisionContext) -> tuple[Tensor, tuple[int, ...]] | None:
        """[I, Nmax] bool of tokens that an encoder patch survived for, and their counts. Synchronises once."""
        if not one.left:
            return None
        places = one.left[-1][1]
        prefix = self.adapter.prefix_tokens(places)
        marks = torch.ones(places.shape[0], prefix + places.shape[1], device=places.device)
        share = context.pack(spread(marks, places, prefix, one.patches))
        alive = share > 0
        *counts, mixed = torch.cat([alive.sum(1), (alive & (share < 0.999)).any()[None]]).tolist()
        if mixed:
            raise UnsupportedMethod(self._joined(self.adapter, self.method, context.kind))
        return alive, tuple(counts)

    # --- hooks
    def _before_projector(self, module: Any, args: tuple[Any, ...]) -> Any:
        one = self.passes.current
        if one is None:
            return None
        strategy = getattr(self.adapter.model.config, "vision_feature_select_strategy", "full")
        prefix = self.adapter.prefix_tokens(args[0]) if strategy == "full" else 0
        return (self._run(one, self.stages[self._behind], args[0], prefix), *args[1:])

    def _fill_up(self, module: Any, args: Any, output: Any) -> Any:
        if self._behind in self.stages:
            output = self._behind_layers(module, args, output)
        one = self.passes.current
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        if one is None or not one.left:
            return output
        places = one.left[-1][1]
        hidden = spread(hidden, places, hidden.shape[1] - places.shape[1], one.patches)
        one.shortened += ((self._behind, one.patches // self.adapter.spec.unit**2),)  # rows of the projector
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _spread(self, module: Any, args: Any, output: Tensor) -> Tensor | None:
        one = self.passes.current
        if one is None or not one.left:
            return None
        places = one.left[-1][1]
        return spread(output, places, output.shape[1] - places.shape[1], one.patches)
