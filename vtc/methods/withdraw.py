"""Visual token withdrawal: behind some depth of the LLM no visual token is left (arXiv:2410.06169, 2405.05803)."""

from __future__ import annotations

from typing import ClassVar

import torch

from vtc.errors import VTCError
from vtc.method.base import Compressor, ModelSpec, Needs, Plan, Selection, StageView
from vtc.method.registry import register
from vtc.method.schedule import DEPTH, scaled_layer


@register
class Withdraw(Compressor):
    """Let the first layers of the LLM see every visual token, and the layers behind them none.

    Acts inside the LLM; training-free, ranks nothing and reads nothing. Before layer l all visual tokens leave, newline
    tokens too, so that the KV caches of layers from l on hold text alone: the layer cut of YOPO (arXiv:2410.06169), or
    visual token withdrawal (arXiv:2405.05803). The answer then rests on what text rows took from the picture before.

    layer: l, of an LLM of 32 layers, scaled to the depth of others; 20 in YOPO's script, 16 in the figures of the other
    paper for LLaVA-1.5-7B. No retention or keep is given: the mean over the layers is l / L of the tokens.

    Departures from the paper and its code: YOPO leaves the tokens in place, where nobody attends to them, which gives
    the same text rows; its script takes 20 of 40 layers for the 13B model too, where layer=16 does that here; its
    other cuts, of heads, windows and neurons, are not here. Withdrawal chooses l on calibration samples by how far
    the answers' distributions part; here it is given.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> vtc.create("withdraw").plan(llava).stages, vtc.create("withdraw", layer=16).least_retention(llava)
    ((20,), 0.5)
    """

    layer: int = 20

    name: ClassVar[str] = "withdraw"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.layer < DEPTH:
            raise VTCError(f"layer={self.layer!r} is none of layers 1 to {DEPTH - 1} of {DEPTH}; YOPO uses 20")

    @property
    def needs_budget(self) -> bool:
        return False

    def plan(self, model: ModelSpec) -> Plan:
        return Plan((scaled_layer(self.layer, model, first=1),), Needs(), "preserve")

    def select(self, view: StageView) -> Selection:
        items = view.items
        return Selection(torch.zeros_like(items.mask), counts=(0,) * len(items), separators=False)
