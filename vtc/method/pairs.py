"""Methods that compare patches with the question by the CLIP whose vision tower the model has.

A CLIP is a pair: a vision tower, which the multimodal LLM took over, and a text tower trained with it. The method names
the checkpoint; the engine loads it beside the model and shows what the method asks for as `StageView.pair`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from vtc import embedded
from vtc.errors import UnsupportedMethod
from vtc.method.base import Compressor, ModelSpec, Needs, Plan, Rows, StageView
from vtc.method.checkpoint import digests


@dataclass(frozen=True, eq=False)
class PairFeatures:
    """What the engine offers of a pair. texts: [B, C] float32, the question of each batch row as the text tower encodes
    it, of no particular length. project: [..., D] rows of the vision tower -> float32 [..., C], through its last norm
    and its projection, without gradients.
    """

    texts: Tensor
    project: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PairedCompressor(Compressor):
    """A method that may compare patches with the question by a CLIP pair.

    pair: a folder, hub name or name of open_clip's (with its weights behind a colon, such as "ViT-L-14-336:openai") of
    the CLIP from which the model's vision tower was taken, or the embedded "tiny-clip".

    >>> import vtc
    >>> vtc.create("trim", pair="tiny-clip").pair
    'tiny-clip'
    """

    pair: str | None = field(default=None, kw_only=True)

    def described(self) -> dict[str, Any]:
        given = super().described()
        if self.pair is None:
            return given
        found = pair_digests(self.pair)
        return {**given, "pair_digests": found} if found else given

    def paired(self, plan: Plan, model: ModelSpec) -> Plan:
        """`plan` with what `compared` needs; UnsupportedMethod where the encoder is no half of a CLIP."""
        if not model.clip:
            raise UnsupportedMethod(
                f"{self.name!r} compares patches with the question by a CLIP pair, of which the vision encoder of this "
                f"{model.family} model is no half; choose a model with a CLIP tower, such as LLaVA-1.5, or a method "
                "without a pair"
            )
        needs = Needs(vision={model.feature_layer: Rows.HIDDEN}, pairs=(self.pair,))
        return dataclasses.replace(plan, needs=plan.needs | needs)

    def compared(self, view: StageView) -> tuple[Tensor, Tensor]:
        """Tokens [I, N, C] and questions [I, C] in the space in which the pair compares them; float32."""
        pair, rows = view.pair(self.pair), view.vision_attention(view.model.feature_layer, Rows.HIDDEN)
        return pair.project(rows), pair.texts[view.items.row]


def pair_digests(name: str) -> dict[str, Any]:
    """What identifies the files behind a pair's name; nothing for names that mean the same weights everywhere."""
    folder = embedded.model_path(name) if name in embedded.ENCODERS else Path(name)
    try:
        return digests(folder) if folder.is_dir() else {}
    except OSError:  # a name that no file can have
        return {}
