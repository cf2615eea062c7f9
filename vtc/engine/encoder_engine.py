"""The engine of vision encoders without an LLM behind them: one method's encoder stages on one unmodified model."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from vtc.adapters.placement import device_of
from vtc.batch.prompt import Bounds
from vtc.batch.trace import CallRecord, Stats
from vtc.engine.copies import CopyGuard
from vtc.engine.encoder_pass import EncoderPass
from vtc.engine.encoder_stages import EncoderStages
from vtc.engine.inputs import by_name, check_compiled
from vtc.engine.installed import Hook, MethodWrapper
from vtc.engine.notes import bounded, without_frames
from vtc.engine.recording import Recording
from vtc.errors import UnsupportedCall, UnsupportedMethod, VTCError
from vtc.method.base import Compressor, EncoderStage, Plan, Positions
from vtc.method.budget import Budget

if TYPE_CHECKING:
    from vtc.adapters.encoder_base import EncoderAdapter
    from vtc.cost.shapes import PairShape

OWNER = "_vtc_encoder_engine"
USUAL = 32
"""Layers of an LLM, to ask methods what they would do in one."""


class EncoderEngine:
    """One method attached to one encoder. `attach` and `detach` are the whole life cycle.

    A retention is the share of an image's patches that leaves the last layer. Raises UnsupportedMethod for a plan with
    a stage outside of the encoder.
    """

    positions: ClassVar[Positions] = "preserve"
    auxiliary_loss: ClassVar[Tensor | None] = None
    pairs: ClassVar[tuple[PairShape, ...]] = ()

    def __init__(self, adapter: EncoderAdapter, method: Compressor, budget: Budget | None, *, trace: bool) -> None:
        plan = _plan(method, adapter)
        self.adapter, self.method, self.budget, self.tracing = adapter, method, budget, trace
        self.stats, self.trace, self.errors = Stats(), list[CallRecord](), bounded()
        self.module: nn.Module | None = method.module(adapter.spec)
        if self.module is not None:
            self.module.to(device_of(adapter.model))
        self.plan = plan
        self.stages = EncoderStages(adapter, method, plan, budget, self.module)
        self.passes = self.stages.passes
        self._recording = Recording(adapter, plan.needs.vision_pairs, self.passes)
        self._noting = threading.Lock()
        self._handles: list[Any] = []
        self._wrappers: list[MethodWrapper] = []
        self._guard = CopyGuard(adapter.model)

    # --- life cycle
    def attach(self) -> None:
        """Install all hooks. Raises VTCError when the encoder already carries an engine."""
        encoder = self.adapter.encoder
        if OWNER in encoder.__dict__:
            raise VTCError("this model already has a method attached; detach it first (leave its `with` block)")
        layers = list(self.adapter.vision_layers)
        check_compiled((self.adapter.model, encoder, *layers), layers[0], inside=False)
        encoder.__dict__[OWNER] = self
        self.stages.install()
        self._recording.install()
        self._handles = [
            encoder.register_forward_pre_hook(Hook(self._enter), with_kwargs=True),
            encoder.register_forward_hook(Hook(self._leave), with_kwargs=True, always_call=True),
        ]
        for name in self.adapter.ways_around:
            body = functools.partial(self._within, name, getattr(encoder, name))
            self._wrappers.append(MethodWrapper(encoder, name, body))
        self._guard.install()

    @property
    def attached(self) -> bool:
        """True until `detach`."""
        return self.adapter.encoder.__dict__.get(OWNER) is self

    def detach(self) -> None:
        """Remove everything; harmless when already detached."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for one in self.passes:
            self.passes.end(one)
        self._guard.remove()
        if self.attached:
            for wrapper in self._wrappers:
                wrapper.remove()
            self.stages.remove()
            self._recording.remove()
            del self.adapter.encoder.__dict__[OWNER]

    @property
    def bounds(self) -> Bounds:
        """Nothing: an encoder has no prompt."""
        return Bounds()

    @bounds.setter
    def bounds(self, bounds: Bounds) -> None:
        raise VTCError(f"a {type(self.adapter.model).__name__} has no prompt whose length could be set; leave it out")

    def _within(self, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A method of the encoder that runs its layers: only a call of the encoder itself may come here."""
        if self.passes.current is None:
            raise UnsupportedCall(
                f"{name}() runs the layers of this encoder without the method attached to it; call the model itself, "
                "or leave the `with` block first"
            )
        return method(*args, **kwargs)

    # --- hooks
    def _enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            self.adapter.check_call(by_name(module, args, kwargs))
        except Exception as error:
            self.errors.append(without_frames(error))
            raise
        self.passes.begin(EncoderPass(tracing=self.tracing))

    def _leave(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        one = self.passes.current
        if one is None:
            return
        self.passes.end(one)
        if output is None or one.seats is None:  # it raised, or no stage was reached
            return
        tokens = one.seats.parts[0].batch.visual_tokens
        pads = self.adapter.pools_patches and self.adapter.pool is None
        if pads and len(set(tokens)) > 1:
            raise UnsupportedMethod(
                f"{self.method.name!r} left {min(tokens)} to {max(tokens)} patches of the images of this batch; what "
                f"{self.adapter.family} pools is made of all of them, padding included. Pass images one by one, or "
                "choose a method that keeps equally many"
            )
        with self._noting:
            self.stats.add(one.stats(len(self.adapter.vision_layers)))
            self.stats.seconds += one.seconds
            if one.record is not None:
                self.trace.append(one.record)


def _plan(method: Compressor, adapter: EncoderAdapter) -> Plan:
    """The method's plan. With an LLM of usual depth behind the encoder it would have to be the same.

    Some methods would leave out what they do in the LLM, or could not say what is missing.
    """
    plan = method.plan(replace(adapter.spec, llm_layers=USUAL))
    if plan.needs.llm or not all(isinstance(stage, EncoderStage) for stage in plan.stages):
        raise UnsupportedMethod(
            f"{method.name!r} does not act inside the vision encoder alone, and this {type(adapter.model).__name__} "
            "has no LLM behind its encoder; choose a method, or a form of it, with encoder stages only, for example "
            "vtc.create('tome', inside=True)"
        )
    return plan
