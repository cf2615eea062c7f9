"""Stages inside the vision encoder: later layers run on fewer patches, the projected features get their places back.

The encoder shortens, the projector's output is spread over the original raster again (zeros where a patch was
dropped), so that every family's packing code sees the number of patches it expects; the engine drops the empty rows
before the LLM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtc.budget import Budget
from vtc.compressor import Compressor, EncoderStage, Needs, StageView
from vtc.errors import UnsupportedMethod
from vtc.items import ItemTable
from vtc.layout import Kind, VisionContext, VisualItem
from vtc.ops.select import front_pack, take_rows
from vtc.readings import VisionReading, exact

if TYPE_CHECKING:
    from vtc.adapters.base import Adapter


@dataclass(frozen=True, eq=False)
class _Left:
    """What a stage left: [crops, M] raster index of each patch (the raster's size behind a crop's last one).

    layer: the stage's. valid: [crops, M] bool, None where all crops kept the same number. counts: per crop.
    """

    layer: int
    places: Tensor
    valid: Tensor | None
    counts: tuple[int, ...]


class EncoderStages:
    """Runs a method's encoder stages. Each crop is an item; shorter ones are padded and masked inside the encoder.

    recorded: what the encoder layers that already ran left, by layer and reading.
    """

    def __init__(
        self,
        adapter: Adapter,
        method: Compressor,
        stages: list[EncoderStage],
        budget: Budget | None,
        needs: Needs,
        module: nn.Module | None,
    ) -> None:
        if adapter.packed:
            raise UnsupportedMethod(
                f"{method.name!r} removes patches inside the vision encoder; {adapter.family} encodes all items as one "
                "packed sequence and merges groups of neighbouring patches, which stages inside the encoder do not "
                "support. Choose a method that acts before or inside the LLM"
            )
        if adapter.joined >= set(adapter.modalities):
            raise UnsupportedMethod(self._joined(adapter, method, "image"))
        self.adapter, self.method, self.budget, self.needs, self.module = adapter, method, budget, needs, module
        self.stages = {stage.layer: stage for stage in stages}
        self.recorded: Callable[[], dict[tuple[int, VisionReading], Tensor]] = dict
        self._behind = adapter.spec.feature_layer + 1  # the layer number that means "before the projector"
        self._handles: list[Any] = []
        self._left: list[_Left] = []
        self._before: list[_Left] = []
        self._patches = 0
        self._memory: dict[Any, Any] = {}
        for layer in self.stages:
            if not 1 <= layer <= self._behind:
                raise UnsupportedMethod(
                    f"an encoder stage before layer {layer} was asked for; the features of this {adapter.family} model "
                    f"leave layer {adapter.spec.feature_layer}, so only stages 1 to that layer, and one more for the "
                    "projector, have an effect"
                )

    def install(self) -> None:
        """Hook the encoder layers and the projector."""
        first = min(self.stages)
        for layer, module in enumerate(self.adapter.vision_layers):
            if first <= layer:
                self._handles.append(module.register_forward_pre_hook(self._hook(layer), with_kwargs=True))
        projector = self.adapter.projector
        if self._behind in self.stages:
            self._handles.append(projector.register_forward_pre_hook(self._before_projector))
        self._handles.append(projector.register_forward_hook(self._spread))

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._left, self._before = [], [], []

    def begin(self, kind: Kind) -> None:
        """Open one encoder call; refuses modalities in which removing single patches has no meaning."""
        if kind in self.adapter.joined:
            raise UnsupportedMethod(self._joined(self.adapter, self.method, kind))
        self._memory = {}

    @staticmethod
    def _joined(adapter: Adapter, method: Compressor, kind: Kind) -> str:
        return (
            f"{method.name!r} removes patches inside the vision encoder; {adapter.family} makes each {kind} token of "
            "several patches, so stages inside it are not supported. Choose a method that acts before or inside the LLM"
        )

    def end(self) -> None:
        """Close one encoder call; what `alive` and `expand` need stays until the next one."""
        self._before, self._left = self._left, []

    def alive(self, context: VisionContext) -> tuple[Tensor, tuple[int, ...]] | None:
        """[I, Nmax] bool of tokens that an encoder patch survived for, and their counts. Synchronises once."""
        if not self._before:
            return None
        places = self._before[-1].places
        prefix = self.adapter.prefix_tokens(places)
        marks = torch.ones(places.shape[0], prefix + places.shape[1], device=places.device)
        share = context.pack(_spread(marks, places, prefix, self._patches))
        alive = share > 0
        *counts, mixed = torch.cat([alive.sum(1), (alive & (share < 0.999)).any()[None]]).tolist()
        if mixed:
            raise UnsupportedMethod(self._joined(self.adapter, self.method, context.kind))
        return alive, tuple(counts)

    def expand(self, layer: int, values: Tensor) -> Tensor:
        """Rows recorded at `layer`, [crops, prefix + M, ...] -> [crops, prefix + P, ...]; zero for missing patches."""
        stages = self._left or self._before
        seen = [left.places for left in stages if left.layer <= layer and left.layer != self._behind]
        if not seen:
            return values
        return _spread(values, seen[-1], values.shape[1] - seen[-1].shape[1], self._patches)

    # --- hooks
    def _hook(self, layer: int) -> Any:
        def shorten(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if layer in self.stages and layer != self._behind:
                hidden = self._select(self.stages[layer], hidden, self.adapter.prefix_tokens(hidden))
            mask = self._mask(hidden)
            if len(args) > 1:
                return (hidden, args[1] if mask is None else mask, *args[2:]), kwargs
            kwargs = kwargs if mask is None else {**kwargs, "attention_mask": mask}
            return ((hidden,), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return shorten

    def _mask(self, hidden: Tensor) -> Tensor | None:
        """[crops, 1, 1, T] bool, or additive under eager attention, where crops are of different length."""
        valid = self._left[-1].valid if self._left else None
        if valid is None:
            return None
        attention: Any = self.adapter.vision_attention[0]
        implementation = attention.config._attn_implementation
        if implementation not in ("sdpa", "eager"):
            raise UnsupportedMethod(
                f"{self.method.name!r} keeps another number of patches in each crop, which needs a padding mask inside "
                f"the encoder; {implementation!r} attention takes none there. Load the model with "
                "attn_implementation='sdpa'"
            )
        mask = torch.nn.functional.pad(valid, (hidden.shape[1] - valid.shape[1], 0), value=True)[:, None, None]
        if implementation == "sdpa":
            return mask
        return torch.zeros(mask.shape, dtype=hidden.dtype, device=mask.device).masked_fill(
            ~mask, torch.finfo(hidden.dtype).min
        )

    def _before_projector(self, module: Any, args: tuple[Any, ...]) -> Any:
        strategy = getattr(self.adapter.model.config, "vision_feature_select_strategy", "full")
        prefix = self.adapter.prefix_tokens(args[0]) if strategy == "full" else 0
        return (self._select(self.stages[self._behind], args[0], prefix), *args[1:])

    def _select(self, stage: EncoderStage, hidden: Tensor, prefix: int) -> Tensor:
        if stage.layer == min(self.stages):
            self._left, self._patches = [], hidden.shape[1] - prefix
        if self.method.keeps_all(self.budget, self._patches):
            return hidden
        view = self._view(stage, hidden, prefix)
        with exact(hidden.device):
            selection = self.method.select(view)
        if selection is None:
            return hidden
        keep = selection.keep & view.items.mask
        counts = tuple(selection.counts if selection.counts is not None else keep.sum(1).tolist())
        if selection.tokens is not None:
            hidden = view.items.scatter(selection.tokens, hidden, where=keep)
        width = max(counts)
        order = front_pack(keep, width)
        places, valid = view.items.token.gather(1, order), None
        if min(counts) < width:
            steps = torch.arange(width, device=hidden.device)
            valid = steps < torch.tensor(counts, device=hidden.device)[:, None]
            places = torch.where(valid, places, self._patches)
        self._left.append(_Left(stage.layer, places, valid, counts))
        front = torch.arange(prefix, device=hidden.device).expand(len(counts), -1)
        return take_rows(hidden, torch.cat([front, order + prefix], dim=1))

    def _view(self, stage: EncoderStage, hidden: Tensor, prefix: int) -> StageView:
        crops, length, _ = hidden.shape
        count, device = length - prefix, hidden.device
        every = torch.arange(count, device=device).expand(crops, -1)
        left = self._left[-1] if self._left else _Left(0, every, None, (count,) * crops)
        mask = torch.ones_like(every, dtype=torch.bool) if left.valid is None else left.valid
        number = torch.arange(crops, device=device)
        numbers = tuple(range(crops))
        table = ItemTable(
            row=number, index=torch.where(mask, prefix + every, 0), token=torch.where(mask, left.places, 0), mask=mask,
            source=number, positions=left.places, rows=numbers, sources=numbers, counts=left.counts,
            fixed=(0,) * crops, input_counts=(self._patches,) * crops, entered=left.counts,
            layouts=(_crop(self._patches, device),) * crops,
        )  # fmt: skip
        visual = torch.nn.functional.pad(mask, (prefix, 0))
        valid = torch.nn.functional.pad(mask, (prefix, 0), value=True)
        rows = {
            (layer, reading): self.expand(layer, values)[:, -self._patches :]
            for (layer, reading), values in self.recorded().items()
        }
        return StageView(
            stage=stage, model=self.adapter.spec, budget=self.budget, items=table, separators=table.split()[1],
            hidden=hidden, visual=visual, valid=valid, prompt=visual, text=torch.zeros_like(valid),
            fingerprint=torch.zeros_like(number), vision_rows=rows, needs=self.needs, memory=self._memory,
            module=self.module,
        )  # fmt: skip

    def _spread(self, module: Any, args: Any, output: Tensor) -> Tensor | None:
        if not self._left:
            return None
        places = self._left[-1].places
        return _spread(output, places, output.shape[1] - places.shape[1], self._patches)


def _spread(values: Tensor, places: Tensor, prefix: int, patches: int) -> Tensor:
    """[crops, prefix + M, ...] -> [crops, prefix + patches, ...], zeros where no place points.

    Places at `patches` and beyond are thrown away.
    """
    full = values.new_zeros(values.shape[0], prefix + patches + 1, *values.shape[2:])
    crop = torch.arange(values.shape[0], device=values.device)[:, None]
    full = full.index_put((crop, places + prefix), values[:, prefix:])[:, :-1]
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
