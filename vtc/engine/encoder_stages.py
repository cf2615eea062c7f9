"""Stages inside the vision encoder: later layers run on fewer patches, the projected features get their places back.

The encoder shortens, the projector's output is spread over the original raster again (zeros where a patch was
dropped), so that every family's packing code sees the number of patches it expects; the engine drops the empty rows
before the LLM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtc.batch.context import VisionContext
from vtc.batch.items import ItemTable
from vtc.engine.encoder_call import EncoderCall, Left
from vtc.engine.installed import Hook
from vtc.errors import UnsupportedMethod
from vtc.method.base import Compressor, EncoderStage, Needs, StageView
from vtc.method.budget import Budget
from vtc.method.layout import Kind, VisualItem
from vtc.method.readings import VisionReading, exact
from vtc.ops.select import front_pack, take_rows

if TYPE_CHECKING:
    from vtc.adapters.base import Adapter


class EncoderStages:
    """Runs a method's encoder stages. Each crop is an item; shorter ones are padded and masked inside the encoder.

    current: the calling thread's encoder call, None outside of one: then the encoder runs untouched. Whatever belongs
    to a call lies in it, so that threads do not meet. recorded: what the layers of a call that already ran left, by
    layer and reading.
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
        self.current: Callable[[], EncoderCall | None] = lambda: None
        self.recorded: Callable[[EncoderCall], dict[tuple[int, VisionReading], Tensor]] = lambda call: {}
        self._behind = adapter.spec.feature_layer + 1  # the layer number that means "before the projector"
        self._handles: list[Any] = []
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
                self._handles.append(module.register_forward_pre_hook(Hook(self._shorten, layer), with_kwargs=True))
        projector = self.adapter.projector
        if self._behind in self.stages:
            self._handles.append(projector.register_forward_pre_hook(Hook(self._before_projector)))
        self._handles.append(projector.register_forward_hook(Hook(self._spread)))

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def check(self, kind: Kind) -> None:
        """Refuse modalities in which removing single patches has no meaning."""
        if kind in self.adapter.joined:
            raise UnsupportedMethod(self._joined(self.adapter, self.method, kind))

    @staticmethod
    def _joined(adapter: Adapter, method: Compressor, kind: Kind) -> str:
        return (
            f"{method.name!r} removes patches inside the vision encoder; {adapter.family} makes each {kind} token of "
            "several patches, so stages inside it are not supported. Choose a method that acts before or inside the LLM"
        )

    def alive(self, call: EncoderCall, context: VisionContext) -> tuple[Tensor, tuple[int, ...]] | None:
        """[I, Nmax] bool of tokens that an encoder patch survived for, and their counts. Synchronises once."""
        if not call.left:
            return None
        places = call.left[-1].places
        prefix = self.adapter.prefix_tokens(places)
        marks = torch.ones(places.shape[0], prefix + places.shape[1], device=places.device)
        share = context.pack(_spread(marks, places, prefix, call.patches))
        alive = share > 0
        *counts, mixed = torch.cat([alive.sum(1), (alive & (share < 0.999)).any()[None]]).tolist()
        if mixed:
            raise UnsupportedMethod(self._joined(self.adapter, self.method, context.kind))
        return alive, tuple(counts)

    def expand(self, call: EncoderCall, layer: int, values: Tensor) -> Tensor:
        """Rows recorded at `layer`, [crops, prefix + M, ...] -> [crops, prefix + P, ...]; zero for missing patches."""
        seen = [left.places for left in call.left if left.layer <= layer and left.layer != self._behind]
        if not seen:
            return values
        return _spread(values, seen[-1], values.shape[1] - seen[-1].shape[1], call.patches)

    # --- hooks
    def _shorten(self, layer: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self.current()
        if call is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if layer in self.stages and layer != self._behind:
            hidden = self._select(call, self.stages[layer], hidden, self.adapter.prefix_tokens(hidden))
        mask = self._mask(call, hidden)
        if len(args) > 1:
            return (hidden, args[1] if mask is None else mask, *args[2:]), kwargs
        kwargs = kwargs if mask is None else {**kwargs, "attention_mask": mask}
        return ((hidden,), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _mask(self, call: EncoderCall, hidden: Tensor) -> Tensor | None:
        """[crops, 1, 1, T] bool, or additive under eager attention, where crops are of different length."""
        valid = call.left[-1].valid if call.left else None
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
        call = self.current()
        if call is None:
            return None
        strategy = getattr(self.adapter.model.config, "vision_feature_select_strategy", "full")
        prefix = self.adapter.prefix_tokens(args[0]) if strategy == "full" else 0
        return (self._select(call, self.stages[self._behind], args[0], prefix), *args[1:])

    def _select(self, call: EncoderCall, stage: EncoderStage, hidden: Tensor, prefix: int) -> Tensor:
        if stage.layer == min(self.stages):
            call.left, call.patches = [], hidden.shape[1] - prefix
        if self.method.keeps_all(self.budget, call.patches):
            return hidden
        view = self._view(call, stage, hidden, prefix)
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
            places = torch.where(valid, places, call.patches)
        call.left.append(Left(stage.layer, places, valid, counts))
        front = torch.arange(prefix, device=hidden.device).expand(len(counts), -1)
        return take_rows(hidden, torch.cat([front, order + prefix], dim=1))

    def _view(self, call: EncoderCall, stage: EncoderStage, hidden: Tensor, prefix: int) -> StageView:
        crops, length, _ = hidden.shape
        count, device = length - prefix, hidden.device
        every = torch.arange(count, device=device).expand(crops, -1)
        left = call.left[-1] if call.left else Left(0, every, None, (count,) * crops)
        mask = torch.ones_like(every, dtype=torch.bool) if left.valid is None else left.valid
        number = torch.arange(crops, device=device)
        numbers = tuple(range(crops))
        table = ItemTable(
            row=number, index=torch.where(mask, prefix + every, 0), token=torch.where(mask, left.places, 0), mask=mask,
            source=number, positions=left.places, rows=numbers, sources=numbers, counts=left.counts,
            fixed=(0,) * crops, input_counts=(call.patches,) * crops, entered=left.counts,
            layouts=(_crop(call.patches, device),) * crops,
        )  # fmt: skip
        visual = torch.nn.functional.pad(mask, (prefix, 0))
        valid = torch.nn.functional.pad(mask, (prefix, 0), value=True)
        rows = {
            (layer, reading): self.expand(call, layer, values)[:, -call.patches :]
            for (layer, reading), values in self.recorded(call).items()
        }
        return StageView(
            stage=stage, model=self.adapter.spec, budget=self.budget, items=table, separators=table.split()[1],
            hidden=hidden, visual=visual, valid=valid, prompt=visual, text=torch.zeros_like(valid),
            fingerprint=torch.zeros_like(number), vision_rows=rows, needs=self.needs, memory=call.memory,
            module=self.module,
        )  # fmt: skip

    def _spread(self, module: Any, args: Any, output: Tensor) -> Tensor | None:
        call = self.current()
        if call is None or not call.left:
            return None
        places = call.left[-1].places
        return _spread(output, places, output.shape[1] - places.shape[1], call.patches)


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
