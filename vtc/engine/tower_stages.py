"""Encoder stages in front of an LLM: the projected features get the places of their patches back.

The encoder shortens; where the model first joins rows by their places, or behind the projector, they are spread over
the original raster again (zeros where a patch was dropped), so that every family's packing code sees the number of
rows it expects. The engine drops the empty ones before the LLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtc.batch.context import VisionContext
from vtc.engine.encoder_pass import EncoderPass
from vtc.engine.encoder_stages import EncoderStages
from vtc.engine.installed import Hook
from vtc.engine.seats import Packed
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
        if not adapter.spec.encoder_stages:
            raise UnsupportedMethod(
                f"{method.name!r} removes patches inside the vision encoder, which this {adapter.family} model does "
                "not allow: its features are those of several layers or of an inner one, or its layers take no masks. "
                "Choose a method that acts before or inside the LLM"
            )
        super().__init__(adapter, method, plan, budget, module)

    def unit(self, one: EncoderPass) -> int:
        return self.adapter.unit(one.kind) or 1

    def check(self, kind: Kind) -> None:
        """Refuse modalities in which removing patches has no meaning."""
        if not self.adapter.unit(kind) and not self.plan.restores:
            raise UnsupportedMethod(self._shared(kind))

    def _shared(self, kind: Kind) -> str:
        return (
            f"{self.method.name!r} removes patches inside the vision encoder; {self.adapter.family} makes each {kind} "
            "token here of patches that its neighbours share, because it resizes the map of patches. Choose a method "
            f"that acts before or inside the LLM{', or pass smaller images' if kind == 'image' else ''}"
        )

    def alive(self, one: EncoderPass, context: VisionContext) -> tuple[Tensor, tuple[int, ...]] | None:
        """[I, Nmax] bool of tokens that an encoder patch survived for, and their counts. Synchronises once."""
        if one.seats is None or not one.pruned:
            return None
        places = one.seats.left[-1][1]
        marks = torch.ones(places.shape if places.ndim > 1 else (1, len(places)), device=places.device)
        marks = torch.nn.functional.pad(marks, (self.adapter.prefix_tokens(marks), 0), value=1.0)
        share = context.pack(one.seats.expand(marks))
        alive = share > 0
        *counts, mixed = torch.cat([alive.sum(1), (alive & (share < 0.999)).any()[None]]).tolist()
        if mixed:
            raise UnsupportedMethod(self._shared(context.kind))
        return alive, tuple(counts)

    # --- hooks
    def _install_end(self) -> None:
        gathering = [self.adapter.gathering(kind) for kind in self.adapter.modalities]
        for module, side in dict.fromkeys(place for place in gathering if place is not None):
            if side == "before":
                self._handles.append(module.register_forward_pre_hook(Hook(self._fill_before)))
            else:
                self._handles.append(module.register_forward_hook(Hook(self._fill_behind)))
        if None in gathering:
            if self._behind in self.stages:
                self._handles.append(self.adapter.projector.register_forward_pre_hook(Hook(self._before_projector)))
            for module in self.adapter.projectors:
                self._handles.append(module.register_forward_hook(Hook(self._behind_projector)))

    def _pass(self, *, gathers: bool) -> EncoderPass | None:
        """The running pass, if its modality joins rows ahead of the projector or does not."""
        one = self.passes.current
        return one if one is not None and (self.adapter.gathering(one.kind) is not None) == gathers else None

    def _last(self, one: EncoderPass, hidden: Tensor) -> Tensor:
        """Pass the stage behind the feature layer, if there is one; hidden: with or without a class token."""
        if self._behind not in self.stages:
            return hidden
        strategy = getattr(self.adapter.model.config, "vision_feature_select_strategy", "full")
        return self._run(
            one, self.stages[self._behind], hidden, self.adapter.prefix_tokens(hidden) * (strategy == "full")
        )

    def _fill_before(self, module: Any, args: tuple[Any, ...]) -> Any:
        one = self._pass(gathers=True)
        return None if one is None else (self._filled(one, self._last(one, args[0])), *args[1:])

    def _fill_behind(self, module: Any, args: Any, output: Any) -> Any:
        one = self._pass(gathers=True)
        if one is None:
            return None
        if self._behind in self.stages:
            output = self._behind_layers(module, args, output)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        hidden = self._filled(one, hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _filled(self, one: EncoderPass, hidden: Tensor) -> Tensor:
        if one.seats is None or not one.pruned:
            return hidden
        one.shortened += ((self._behind, one.seats.parts[0].tokens),)  # the projector's rows of each crop
        return one.seats.expand(hidden)

    def _before_projector(self, module: Any, args: tuple[Any, ...]) -> Any:
        one = self._pass(gathers=False)
        return None if one is None else (self._last(one, args[0]), *args[1:])

    def _behind_projector(self, module: Any, args: Any, output: Tensor) -> Tensor | None:
        one = self._pass(gathers=False)
        if one is None or one.seats is None or not one.pruned:
            return None
        if not isinstance(one.seats, Packed):
            return one.seats.expand(output)
        if module is self.adapter.projector:
            one.shortened += ((self._behind, one.seats.mean_rows / one.seats.size),)
        return one.seats.joined(output)
