"""Stages inside the vision encoder: later layers run on fewer patches, the projected features get their places back.

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
from vtc.engine.installed import Hook
from vtc.engine.passes import Passes
from vtc.errors import UnsupportedMethod
from vtc.method.base import Compressor, EncoderStage, Needs, StageView
from vtc.method.budget import Budget
from vtc.method.layout import Kind
from vtc.method.readings import exact

if TYPE_CHECKING:
    from vtc.adapters.base import Adapter


class EncoderStages:
    """Runs a method's encoder stages. Each crop is an item; shorter ones are padded and masked inside the encoder.

    passes: of the encoder; outside of one it runs untouched. Whatever belongs to a call lies in its pass, so that
    threads do not meet.
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
        self.passes = Passes[EncoderPass]()
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

    def alive(self, one: EncoderPass, context: VisionContext) -> tuple[Tensor, tuple[int, ...]] | None:
        """[I, Nmax] bool of tokens that an encoder patch survived for, and their counts. Synchronises once."""
        if not one.left:
            return None
        places = one.left[-1][1]
        prefix = self.adapter.prefix_tokens(places)
        marks = torch.ones(places.shape[0], prefix + places.shape[1], device=places.device)
        share = context.pack(_spread(marks, places, prefix, one.patches))
        alive = share > 0
        *counts, mixed = torch.cat([alive.sum(1), (alive & (share < 0.999)).any()[None]]).tolist()
        if mixed:
            raise UnsupportedMethod(self._joined(self.adapter, self.method, context.kind))
        return alive, tuple(counts)

    def expand(self, one: EncoderPass, layer: int, values: Tensor) -> Tensor:
        """Rows recorded at `layer`, [crops, prefix + M, ...] -> [crops, prefix + P, ...]; zero for missing patches."""
        seen = [places for stage, places in one.left if stage <= layer and stage != self._behind]
        if not seen:
            return values
        return _spread(values, seen[-1], values.shape[1] - seen[-1].shape[1], one.patches)

    # --- hooks
    def _shorten(self, layer: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        one = self.passes.current
        if one is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if layer in self.stages and layer != self._behind:
            hidden = self._run(one, self.stages[layer], hidden, self.adapter.prefix_tokens(hidden))
        mask = self._mask(one, hidden)
        if len(args) > 1:
            return (hidden, args[1] if mask is None else mask, *args[2:]), kwargs
        kwargs = kwargs if mask is None else {**kwargs, "attention_mask": mask}
        return ((hidden,), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _mask(self, one: EncoderPass, hidden: Tensor) -> Tensor | None:
        """[crops, 1, 1, T] bool, or additive under eager attention, where crops are of different length."""
        valid = None if one.batch is None else one.batch.rows.valid
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
        mask = valid[:, None, None]
        if implementation == "sdpa":
            return mask
        return torch.zeros(mask.shape, dtype=hidden.dtype, device=mask.device).masked_fill(
            ~mask, torch.finfo(hidden.dtype).min
        )

    def _before_projector(self, module: Any, args: tuple[Any, ...]) -> Any:
        one = self.passes.current
        if one is None:
            return None
        strategy = getattr(self.adapter.model.config, "vision_feature_select_strategy", "full")
        prefix = self.adapter.prefix_tokens(args[0]) if strategy == "full" else 0
        return (self._run(one, self.stages[self._behind], args[0], prefix), *args[1:])

    def _run(self, one: EncoderPass, stage: EncoderStage, hidden: Tensor, prefix: int) -> Tensor:
        """Pass `stage`: [crops, prefix + M, D] rows in, fewer of them out."""
        if stage.layer == min(self.stages):
            one.enter(hidden, prefix)
        one.drop_prefix(prefix)
        if self.method.keeps_all(self.budget, one.patches):
            return hidden
        with exact(hidden.device):
            selection = self.method.select(self._view(one, stage, hidden))
        return hidden if selection is None else one.apply(stage, selection, hidden)

    def _view(self, one: EncoderPass, stage: EncoderStage, hidden: Tensor) -> StageView:
        batch = one.now
        assert batch.items is not None and batch.separators is not None
        valid = batch.rows.held
        visual = torch.nn.functional.pad(batch.items.mask, (one.prefix, 0))
        rows = {
            (layer, reading): self.expand(one, layer, values)[:, -one.patches :]
            for (layer, reading), values in one.recorded(packed=self.adapter.packed).items()
        }
        return StageView(
            stage=stage,
            model=self.adapter.spec,
            budget=self.budget,
            items=batch.items,
            separators=batch.separators,
            hidden=hidden,
            visual=visual,
            valid=valid,
            prompt=visual,
            text=torch.zeros_like(valid),
            fingerprint=torch.zeros_like(batch.items.row),
            vision_rows=rows,
            needs=self.needs,
            memory=one.memory,
            module=self.module,
        )

    def _spread(self, module: Any, args: Any, output: Tensor) -> Tensor | None:
        one = self.passes.current
        if one is None or not one.left:
            return None
        places = one.left[-1][1]
        return _spread(output, places, output.shape[1] - places.shape[1], one.patches)


def _spread(values: Tensor, places: Tensor, prefix: int, patches: int) -> Tensor:
    """[crops, prefix + M, ...] -> [crops, prefix + patches, ...], zeros where no place points.

    Places at `patches` and beyond are thrown away.
    """
    full = values.new_zeros(values.shape[0], prefix + patches + 1, *values.shape[2:])
    crop = torch.arange(values.shape[0], device=values.device)[:, None]
    full = full.index_put((crop, places + prefix), values[:, prefix:])[:, :-1]
    return torch.cat([values[:, :prefix], full[:, prefix:]], dim=1) if prefix else full
