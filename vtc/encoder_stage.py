"""Stages inside the vision encoder: later layers run on fewer patches, the projected features get their places back.

The encoder shortens, the projector's output is spread over the original raster again (zeros where a patch was
dropped), so that every family's packing code sees the number of patches it expects; the engine drops the empty rows
before the LLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtc.budget import Budget
from vtc.compressor import Compressor, EncoderStage, StageView
from vtc.errors import UnsupportedMethod
from vtc.items import ItemTable
from vtc.layout import Kind, VisionContext, VisualItem
from vtc.ops.select import front_pack, take_rows

if TYPE_CHECKING:
    from vtc.adapters.base import Adapter


class EncoderStages:
    """Runs a method's encoder stages. Each crop is an item; all crops must keep the same number of patches."""

    def __init__(self, adapter: Adapter, method: Compressor, stages: list[EncoderStage], budget: Budget | None) -> None:
        if adapter.packed:
            raise UnsupportedMethod(
                f"{method.name!r} removes patches inside the vision encoder; {adapter.family} encodes all items as one "
                "packed sequence and merges groups of neighbouring patches, which stages inside the encoder do not "
                "support. Choose a method that acts before or inside the LLM"
            )
        if adapter.joined >= set(adapter.modalities):
            raise UnsupportedMethod(self._joined(adapter, method, "image"))
        self.adapter, self.method, self.budget = adapter, method, budget
        self.stages = {stage.layer: stage for stage in stages}
        self._handles: list[Any] = []
        self._places: list[tuple[int, Tensor]] = []  # (layer, [crops, M] raster index of the patches left)
        self._by_layer: list[tuple[int, Tensor]] = []
        self._patches = 0
        self._last: tuple[Tensor, int] | None = None
        for layer in self.stages:
            if not 1 <= layer <= adapter.spec.feature_layer:
                raise UnsupportedMethod(
                    f"an encoder stage before layer {layer} was asked for; the features of this {adapter.family} model "
                    f"leave layer {adapter.spec.feature_layer}, so only stages 1 to that layer have an effect"
                )

    def install(self) -> None:
        """Hook the encoder layers and the projector."""
        layers = list(self.adapter.vision_layers)
        for layer, stage in self.stages.items():
            hook = self._hook(stage)
            self._handles.append(layers[layer].register_forward_pre_hook(hook, with_kwargs=True))
        self._handles.append(self.adapter.projector.register_forward_hook(self._spread))

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._places, self._by_layer, self._last = [], [], [], None

    def begin(self, kind: Kind) -> None:
        """Open one encoder call; refuses modalities in which removing single patches has no meaning."""
        if kind in self.adapter.joined:
            raise UnsupportedMethod(self._joined(self.adapter, self.method, kind))

    @staticmethod
    def _joined(adapter: Adapter, method: Compressor, kind: Kind) -> str:
        return (
            f"{method.name!r} removes patches inside the vision encoder; {adapter.family} makes each {kind} token of "
            "several patches, so stages inside it are not supported. Choose a method that acts before or inside the LLM"
        )

    def end(self) -> None:
        """Close one encoder call; what `alive` and `expand` need stays until the next one."""
        self._last = (self._places[-1][1], self._patches) if self._places else None
        self._by_layer, self._places = list(self._places), []

    def alive(self, context: VisionContext) -> tuple[Tensor, tuple[int, ...]] | None:
        """[I, Nmax] bool of tokens that an encoder patch survived for, and their counts. Synchronises once."""
        if self._last is None:
            return None
        places, patches = self._last
        prefix = self.adapter.prefix_tokens(places)
        marks = torch.ones(places.shape[0], prefix + places.shape[1], device=places.device)
        share = context.pack(_spread(marks, places, prefix, patches))
        alive = share > 0
        *counts, mixed = torch.cat([alive.sum(1), (alive & (share < 0.999)).any()[None]]).tolist()
        if mixed:
            raise UnsupportedMethod(self._joined(self.adapter, self.method, context.kind))
        return alive, tuple(counts)

    def expand(self, layer: int, values: Tensor) -> Tensor:
        """Rows recorded at `layer`, [crops, prefix + M] -> [crops, prefix + P]; zero where a patch was gone."""
        seen = [places for stage, places in self._by_layer if stage <= layer]
        if not seen:
            return values
        return _spread(values, seen[-1], values.shape[1] - seen[-1].shape[1], self._patches)

    def _hook(self, stage: EncoderStage) -> Any:
        def shorten(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            hidden = self._select(stage, hidden)
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return shorten

    def _select(self, stage: EncoderStage, hidden: Tensor) -> Tensor:
        crops, length, _ = hidden.shape
        prefix = self.adapter.prefix_tokens(hidden)
        count = length - prefix
        device = hidden.device
        if stage.layer == min(self.stages):
            self._places, self._patches = [], count
        if self.budget is not None and self.budget.tokens(self._patches) >= count:
            return hidden
        places = self._places[-1][1] if self._places else torch.arange(count, device=device).expand(crops, -1)
        table = ItemTable(
            row=torch.arange(crops, device=device),
            index=(prefix + torch.arange(count, device=device)).expand(crops, -1),
            token=places,
            mask=torch.ones(crops, count, dtype=torch.bool, device=device),
            source=torch.arange(crops, device=device),
            positions=places,
            rows=tuple(range(crops)),
            sources=tuple(range(crops)),
            counts=(count,) * crops,
            fixed=(0,) * crops,
            input_counts=(self._patches,) * crops,
            layouts=(_crop(self._patches, device),) * crops,
        )
        visual = torch.ones(crops, length, dtype=torch.bool, device=device)
        visual[:, :prefix] = False
        view = StageView(
            stage, self.adapter.spec, self.budget, table, hidden, visual, torch.ones_like(visual),
            torch.zeros(crops, dtype=torch.long, device=device),
        )  # fmt: skip
        selection = self.method.select(view)
        if selection is None:
            return hidden
        counts = set(selection.counts if selection.counts is not None else selection.keep.sum(1).tolist())
        if len(counts) != 1:
            raise UnsupportedMethod(
                f"{self.method.name!r} keeps {sorted(counts)} patches in crops of one encoder call; an encoder stage "
                "must keep the same number in every crop"
            )
        if selection.tokens is not None:
            hidden = table.scatter(selection.tokens, hidden)
        order = front_pack(selection.keep, counts.pop())
        self._places.append((stage.layer, places.gather(1, order)))
        front = torch.arange(prefix, device=device).expand(crops, -1)
        return take_rows(hidden, torch.cat([front, order + prefix], dim=1))

    def _spread(self, module: Any, args: Any, output: Tensor) -> Tensor | None:
        if not self._places:
            return None
        places = self._places[-1][1]
        return _spread(output, places, output.shape[1] - places.shape[1], self._patches)


def _spread(values: Tensor, places: Tensor, prefix: int, patches: int) -> Tensor:
    """[crops, prefix + M, ...] -> [crops, prefix + patches, ...], zeros where no place points."""
    full = values.new_zeros(values.shape[0], prefix + patches, *values.shape[2:])
    crop = torch.arange(values.shape[0], device=values.device)[:, None]
    full = full.index_put((crop, places + prefix), values[:, prefix:])
    return torch.cat([values[:, :prefix], full[:, prefix:]], dim=1) if prefix else full


def _crop(patches: int, device: torch.device) -> VisualItem:
    side = int(patches**0.5)
    square = side * side == patches
    place = torch.arange(patches, device=device)
    width = side if square else patches
    return VisualItem(
        kind="image",
        n_tokens=patches,
        crop=torch.zeros_like(place),
        row=(place // width).float(),
        col=(place % width).float(),
        newline=torch.zeros(patches, dtype=torch.bool, device=device),
        n_crops=1,
        crop_grid=(side, side) if square else (1, patches),
        grid=(1, side, side) if square else None,
    )
