"""LongVLM's hierarchical merging: every clip of a video is merged by halves (arXiv:2404.03384)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from vtc.errors import UnsupportedMethod, VTCError
from vtc.method.base import Compressor, ModelSpec, Needs, Plan, Rows, Selection, StageView
from vtc.method.parts import clips, merge_items
from vtc.method.registry import register


@register
class LongVLM(Compressor):
    """Merge the tokens of each clip of a video, its frames together, by halves until the budget is met.

    Acts before the LLM; training-free, text-agnostic. A video is cut into `clips` clips of equally many frames. Of a
    clip's tokens, frame after frame, every other one proposes its best partner among the rest; the most alike pairs
    merge, as means weighted by the number of tokens in them, step after step, each halving the tokens while that leaves
    too many (ToMe's matching, no token protected). Alike is the cosine of the encoder's features, the width split into
    `heads` parts of which the mean is taken. Clips keep the same share of their tokens. A merged token lies where the
    last of those that others were merged into does.

    clips, heads: 10 and 16 in the code, which makes 30 tokens of ten frames of 256.

    Departures from the paper and its code: tokens merge behind the projector, by what the encoder says of them. The
    last clip is shorter where frames do not divide, and fewer frames than clips are clips of one; what is left stays in
    raster order. The global part, the class tokens of all encoder layers in front of the others, is left out: these
    would be tokens that the prompt has no place for, and a projector that was not trained on them does not know them.
    The released model was trained with this merging, others were not. A picture is one clip, with all of its tiles.
    Newline tokens stay and are no candidates.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava-next-video"].references[0]  # 24 and 32 layers
    >>> vtc.create("longvlm").plan(llava).needs.vision
    {22: LayerOutput()}
    """

    clips: int = 10
    heads: int = 16

    name: ClassVar[str] = "longvlm"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, code in (("clips", 10), ("heads", 16)):
            if getattr(self, name) < 1:
                raise VTCError(f"{name}={getattr(self, name)!r} has to be at least 1; the code has {code}")

    def plan(self, model: ModelSpec) -> Plan:
        return dataclasses.replace(super().plan(model), needs=Needs({model.feature_layer: Rows.HIDDEN}))

    def select(self, view: StageView) -> Selection | None:
        if view.keep == view.items.counts:
            return None
        features = view.vision_attention(view.model.feature_layer, Rows.HIDDEN)
        if features.shape[2] % self.heads:
            raise UnsupportedMethod(
                f"the {features.shape[2]} features of this {view.model.family} model's encoder do not split into "
                f"{self.heads} heads; pass a number that divides them, heads=1 for the features as they are"
            )
        metric = features.reshape(*features.shape[:2], self.heads, -1).float().mean(2)
        grouped = clips(view, self.clips)
        return merge_items(view, view.keep, metric, grouped=grouped, weighted=True, raster=True)
