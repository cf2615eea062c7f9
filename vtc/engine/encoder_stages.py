"""Stages inside the vision encoder: later layers run on fewer patches, and know how much each of them counts."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtc.batch.rows import RowTable
from vtc.engine.encoder_pass import SIZES, EncoderPass
from vtc.engine.installed import Hook
from vtc.engine.passes import Passes
from vtc.errors import UnsupportedMethod
from vtc.method.base import Compressor, EncoderStage, Plan, StageView
from vtc.method.budget import Budget
from vtc.method.readings import exact
from vtc.method.states import States

if TYPE_CHECKING:
    from vtc.adapters.base import VisionSide


class EncoderStages:
    """Runs a method's encoder stages. Each crop is an item; shorter ones are padded and masked inside the encoder.

    passes: of the encoder; outside of one it runs untouched. Whatever belongs to a call lies in its pass, so that
    threads do not meet.
    """

    def __init__(
        self,
        adapter: VisionSide,
        method: Compressor,
        plan: Plan,
        budget: Budget | None,
        module: nn.Module | None,
    ) -> None:
        self.adapter, self.method, self.plan, self.budget, self.module = adapter, method, plan, budget, module
        self.stages = {stage.layer: stage for stage in plan.stages if isinstance(stage, EncoderStage)}
        self.passes = Passes[EncoderPass]()
        self._behind = adapter.spec.feature_layer + 1  # the layer number that means "behind the last layer"
        self._handles: list[Any] = []
        for layer in self.stages:
            if not 0 <= layer <= self._behind:
                raise UnsupportedMethod(
                    f"an encoder stage before layer {layer} was asked for; the features of this {adapter.family} model "
                    f"leave layer {adapter.spec.feature_layer}, so only stages 0 to that layer, and one more for the "
                    "projector, have an effect"
                )

    def install(self) -> None:
        """Hook the encoder layers, and what comes behind them."""
        first, masked = min(self.stages), self.adapter.masked
        for layer, module in enumerate(self.adapter.vision_layers):
            if first <= layer:
                self._handles.append(module.register_forward_pre_hook(Hook(self._shorten, layer), with_kwargs=True))
                self._handles.append(masked[layer].register_forward_pre_hook(Hook(self._hide), with_kwargs=True))
        projection = self.adapter.patch_projection
        if projection is not None:
            self._handles.append(projection.register_forward_hook(Hook(self._note_grid)))
        self._install_end()

    def _install_end(self) -> None:
        if self._behind in self.stages:
            last = self.adapter.vision_layers[-1]
            self._handles.append(last.register_forward_hook(Hook(self._behind_layers)))

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def expand(self, one: EncoderPass, layer: int, values: Tensor) -> Tensor:
        """Rows recorded at `layer`, [crops, prefix + M, ...] -> [crops, prefix + P, ...]; zero for missing patches."""
        seen = [places for stage, places in one.left if stage <= layer and stage != self._behind]
        if not seen:
            return values
        return spread(values, seen[-1], values.shape[1] - seen[-1].shape[1], one.patches)

    # --- hooks
    def _note_grid(self, module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        one = self.passes.current
        if one is not None and output.ndim == 4:
            one.grid = output.shape[2], output.shape[3]

    def _shorten(self, layer: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        one = self.passes.current
        if one is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if layer in self.stages and layer != self._behind:
            hidden = self._run(one, self.stages[layer], hidden, self.adapter.prefix_tokens(hidden))
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _hide(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        one = self.passes.current
        if one is None or one.batch is None:
            return None
        mask = self._mask(one.now.rows, args[0] if args else kwargs["hidden_states"])
        return None if mask is None else self.adapter.with_mask(mask, args, kwargs)

    def _mask(self, rows: RowTable, hidden: Tensor) -> Tensor | None:
        """[crops, 1, 1, T] on the keys, bool or additive; None where crops are of one length and all keys count one."""
        valid, sizes = rows.valid, rows.extra.get(SIZES)
        if valid is None and sizes is None:
            return None
        implementation = self.adapter.vision_implementation
        if implementation not in ("sdpa", "eager"):
            what = "keeps another number of patches in each crop" if sizes is None else "lets larger patches count more"
            raise UnsupportedMethod(
                f"{self.method.name!r} {what}, which needs a mask inside the encoder; {implementation!r} attention "
                "takes none there. Load the model with attn_implementation='sdpa'"
            )
        if sizes is None and implementation == "sdpa":
            return rows.held[:, None, None]
        bias = torch.zeros_like(rows.source, dtype=torch.float32) if sizes is None else sizes.log()
        bias = bias.to(hidden.dtype).masked_fill(~rows.held, torch.finfo(hidden.dtype).min)
        return bias[:, None, None]

    def _behind_layers(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        one = self.passes.current
        if one is None:
            return None
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        hidden = self._run(one, self.stages[self._behind], hidden, self.adapter.prefix_tokens(hidden))
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _run(self, one: EncoderPass, stage: EncoderStage, hidden: Tensor, prefix: int) -> Tensor:
        """Pass `stage`: [crops, prefix + M, D] rows in, fewer of them out."""
        if stage.layer == min(self.stages):
            one.enter(hidden, prefix)
        one.drop_prefix(prefix)
        if self.method.keeps_all(self.budget, one.patches):
            return hidden
        start = time.perf_counter()
        with exact(hidden.device):
            selection = self.method.select(self._view(one, stage, hidden))
        hidden = hidden if selection is None else one.apply(stage, selection, hidden)
        one.seconds += time.perf_counter() - start
        return hidden

    def _view(self, one: EncoderPass, stage: EncoderStage, hidden: Tensor) -> StageView:
        batch = one.now
        assert batch.items is not None and batch.separators is not None
        valid = batch.rows.held
        visual = torch.nn.functional.pad(batch.items.mask, (one.prefix, 0))
        recorded = one.recorded(packed=self.adapter.packed)
        rows = {pair: self.expand(one, pair[0], values) for pair, values in recorded.items()}
        return StageView(
            stage=stage,
            model=self.adapter.spec,
            budget=self.budget,
            items=batch.items,
            separators=batch.separators,
            states=States(hidden),
            visual=visual,
            valid=valid,
            prompt=visual,
            text=torch.zeros_like(valid),
            fingerprint=torch.zeros_like(batch.items.row),
            vision_rows={pair: values[:, -one.patches :] for pair, values in rows.items()},
            vision_prefix={pair: values[:, : -one.patches] for pair, values in rows.items()},
            needs=self.plan.needs,
            memory=one.memory,
            module=self.module,
        )


def spread(values: Tensor, places: Tensor, prefix: int, patches: int) -> Tensor:
    """[crops, prefix + M, ...] -> [crops, prefix + patches, ...], zeros where no place points.

    Places at `patches` and beyond are thrown away.
    """
    full = values.new_zeros(values.shape[0], prefix + patches + 1, *values.shape[2:])
    crop = torch.arange(values.shape[0], device=values.device)[:, None]
    full = full.index_put((crop, places + prefix), values[:, prefix:])[:, :-1]
    return torch.cat([values[:, :prefix], full[:, prefix:]], dim=1) if prefix else full
