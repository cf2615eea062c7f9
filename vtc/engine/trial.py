"""Whether a method could be attached to a model, before there is a model: its weights may lie on the meta device."""

from __future__ import annotations

from torch import nn

from vtc import adapters
from vtc.engine.encoder_engine import EncoderEngine
from vtc.engine.engine import Engine
from vtc.method.base import Compressor
from vtc.method.budget import Budget


def try_out(model: nn.Module, method: Compressor) -> float:
    """Attach `method` and take it off again; nothing is computed.

    Returns the retention that the method has to exceed on this model, 0 where it takes any or none.
    Raises VTCError for what `vtc.compress` would refuse as well, but for weights without numbers.
    """
    budget = Budget(retention=1.0) if method.needs_budget else None
    engine: Engine | EncoderEngine
    encoder = adapters.encoder_of(model)
    if encoder is not None:
        engine, least = EncoderEngine(encoder, method, budget, trace=False), 0.0
    else:
        adapter = adapters.of(model)
        plan = method.plan(adapter.spec)
        engine = Engine(adapter, method, plan, budget, plan.positions, pad_output=False, trace=False)
        least = method.least_retention(adapter.spec) if method.needs_budget else 0.0
    try:
        engine.attach()
    finally:
        engine.detach()
    return least
