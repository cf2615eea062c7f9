"""Stages inside the vision encoder: later layers run on fewer patches, and know how much each of them counts."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtc.engine.encoder_pass import EncoderPass
from vtc.engine.installed import Hook
from vtc.engine.passes import Passes
from vtc.engine.seats import SIZES, Crops, Packed, Part, Seats
from vtc.engine.unread import refuse_unread
from vtc.errors import UnsupportedMethod
from vtc.method.base import Compressor, EncoderStage, Plan, StageView
from vtc.method.budget import Budget
from vtc.method.readings import exact
from vtc.method.states import States

if TYPE_CHECKING:
    from vtc.adapters.base import VisionSide


class EncoderStages:
    """Runs a method's encoder stages. Each crop is an item; shorter ones are padded and masked inside the encoder.

    Encoders that run all items as one sequence need no padding: its segments get shorter.

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
        if self.adapter.pool is not None:
            self._handles.append(
                self.adapter.pool.register_forward_pre_hook(Hook(self._hide_padding), with_kwargs=True)
            )
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
        """Rows recorded at `layer` -> the same of all patches that went in; zero for those that were gone."""
        return values if one.seats is None else one.seats.expand(values, min(layer, self._behind - 1))

    def unit(self, one: EncoderPass) -> int:
        """Patches along a side of a token."""
        return 1

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
        if one is None or not one.pruned:
            return None
        if isinstance(one.seats, Packed):
            self._check_mask(any(SIZES in part.batch.rows.extra for part in one.seats.parts), takes=False)
            return self.adapter.with_rows(one.seats.now, args, kwargs)
        assert isinstance(one.seats, Crops)
        mask = self._mask(one.seats, args[0] if args else kwargs["hidden_states"])
        return None if mask is None else self.adapter.with_mask(mask, args, kwargs)

    def _hide_padding(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        one = self.passes.current
        if one is None or not isinstance(one.seats, Crops):
            return None
        rows = one.seats.part.batch.rows
        return None if rows.valid is None else self.adapter.with_rows_hidden(one.seats.of_rows(rows.held), args, kwargs)

    def _mask(self, seats: Crops, hidden: Tensor) -> Tensor | None:
        """[crops, 1, 1, T] on the keys, bool or additive; None where crops are of one length and all keys count one."""
        rows = seats.part.batch.rows
        sizes = rows.extra.get(SIZES)
        if rows.valid is None and sizes is None:
            return None
        implementation = self.adapter.vision_implementation
        self._check_mask(sizes is not None, takes=implementation in ("sdpa", "eager"), padded=True)
        held = seats.of_rows(rows.held)
        if sizes is None and implementation == "sdpa":
            return held[:, None, None]
        bias = torch.zeros_like(held, dtype=torch.float32) if sizes is None else seats.of_rows(sizes).log()
        bias = bias.to(hidden.dtype).masked_fill(~held, torch.finfo(hidden.dtype).min)
        return bias[:, None, None]

    def _check_mask(self, sizes: bool, *, takes: bool, padded: bool = False) -> None:
        """Refuse what needs a mask where attention `takes` none: sizes, and padding of shorter crops."""
        if takes or not (sizes or padded):
            return
        if self.adapter.packed:
            raise UnsupportedMethod(
                f"{self.method.name!r} lets larger patches count more, which needs a mask inside the encoder; the "
                f"packed one of {self.adapter.family} takes none. Use a form of it without (proportional=False)"
            )
        what = "lets larger patches count more" if sizes else "keeps another number of patches in each crop"
        raise UnsupportedMethod(
            f"{self.method.name!r} {what}, which needs a mask inside the encoder; "
            f"{self.adapter.vision_implementation!r} attention takes none there. Load the model with "
            "attn_implementation='sdpa'"
        )

    def _behind_layers(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        one = self.passes.current
        if one is None:
            return None
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        hidden = self._run(one, self.stages[self._behind], hidden, self.adapter.prefix_tokens(hidden))
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _run(self, one: EncoderPass, stage: EncoderStage, hidden: Tensor, prefix: int) -> Tensor:
        """Pass `stage`: rows of the encoder in, fewer of them out."""
        if stage.layer == min(self.stages):
            one.enter(self._seats(one, hidden, prefix))
        assert one.seats is not None
        if isinstance(one.seats, Crops):
            one.seats.part.drop_prefix(prefix)
        parts = one.seats.parts
        whole = [self.method.keeps_all(self.budget, part.tokens) for part in parts]
        if all(whole):
            return hidden
        start = time.perf_counter()
        tokens = one.seats.tokens(hidden)
        with exact(hidden.device):
            selections = [
                None if all_stay else self.method.select(self._view(one, stage, part, rows))
                for part, rows, all_stay in zip(parts, tokens, whole, strict=True)
            ]
        said = [selection for selection in selections if selection is not None]
        for selection in said:
            refuse_unread(selection, stage)
        if said:
            hidden = one.apply(stage, selections, tokens)
        one.seconds += time.perf_counter() - start
        return hidden

    def _seats(self, one: EncoderPass, hidden: Tensor, prefix: int) -> Seats:
        unit = self.unit(one)
        if one.packing is not None:
            return Packed(hidden, *one.packing, unit**2)
        return Crops(hidden, prefix, one.grid, unit)

    def _view(self, one: EncoderPass, stage: EncoderStage, part: Part, rows: Tensor) -> StageView:
        batch, seats = part.batch, one.seats
        assert batch.items is not None and batch.separators is not None and seats is not None
        valid = batch.rows.held
        visual = torch.nn.functional.pad(batch.items.mask, (part.prefix, 0))
        recorded = one.recorded(packed=self.adapter.packed)
        every = {pair: self.expand(one, pair[0], values) for pair, values in recorded.items()}
        return StageView(
            stage=stage,
            model=self.adapter.spec,
            budget=self.budget,
            items=batch.items,
            separators=batch.separators,
            states=States(rows),
            visual=visual,
            valid=valid,
            prompt=visual,
            text=torch.zeros_like(valid),
            fingerprint=torch.zeros_like(batch.items.row),
            vision_rows={pair: pair[1].join(seats.members(values, part)) for pair, values in every.items()},
            vision_prefix={pair: seats.lead(values, part) for pair, values in every.items()},
            needs=self.plan.needs,
            memory=part.memory,
            module=self.module,
        )
