"""DivPrune: the tokens that lie farthest apart (arXiv:2503.02175)."""

from __future__ import annotations

from dataclasses import field
from typing import ClassVar

from vtc.method.base import Compressor, Scope, Selection, StageView
from vtc.method.groups import Groups
from vtc.method.registry import register
from vtc.ops.greedy import k_center


@register
class DivPrune(Compressor):
    """Keep the tokens whose smallest mutual distance is largest (the greedy answer to the max-min diversity problem).

    Acts before the LLM on the projected tokens; training-free, text-agnostic, reads no attention. With the distance
    ``d_ij = 1 - cos(v_i, v_j)`` it begins with the token that is farthest from its nearest other one and adds, one at a
    time, the token that is farthest from the nearest chosen one. Ties go to the lower index, kept tokens stay in
    raster order.

    scope: "item" chooses among the tokens of all crops or frames together, "crop" in each of them.

    Departures from the paper and its code: newline tokens are kept and are no candidates (the code chooses among them
    too); shares are rounded half up, not half to even; batches and several images work; cosines are computed in float32
    whatever the model runs in; zero vectors count as equally far from everything instead of giving NaN; multi-axis
    rotary models keep original positions.

    >>> import vtc
    >>> vtc.create("divprune", scope="crop")
    DivPrune(scope='crop')
    """

    scope: Scope = field(default="item", kw_only=True)

    name: ClassVar[str] = "divprune"

    def select(self, view: StageView) -> Selection:
        groups = Groups.of(view, self.scope)
        tokens, mask = groups.parts.take(view.tokens), groups.parts.mask
        order = k_center(tokens, None, groups.steps, mask)
        return Selection(groups.chosen(order), counts=view.keep)
