"""PyramidKV on visual entries: SnapKV with more entries in early layers than in late ones (arXiv:2406.02069)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from vtc.errors import VTCError
from vtc.method.base import StageView
from vtc.method.registry import register
from vtc.methods.snapkv import SnapKV


@register
class PyramidKV(SnapKV):
    """Keep what the prompt's last rows attend to, many entries in the first layer and fewer in each one behind it.

    Acts after the prefill; training-free, follows the question. Entries are ranked as by `snapkv`. With a mean of K
    entries of an item, the last of L layers keeps m = K / beta of them, the first one 2 K - m, and those between lie on
    the line, ``k_l = 2 K - m - 2 (K - m) l / (L - 1)``; where the first layer has fewer entries than that, it keeps all
    n, and the last one 2 K - n.

    beta: 20 as in the released code; 1 is `snapkv`. window, kernel, per_head: as there.

    Departures from the paper and its code: those of `snapkv`; m is rounded down and at least 1; the line is rounded in
    the first half of the layers and mirrored in the second, so that the mean is K exactly; entries inside the window
    count in k_l, and where an item has more of them in a late layer the latest stay.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]
    >>> vtc.create("pyramidkv", beta=10).plan(llava).stages[:2]
    (CacheStage(from_layer=0), CacheStage(from_layer=1))
    """

    beta: int = 20

    name: ClassVar[str] = "pyramidkv"
    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 1:
            raise VTCError(
                f"beta={self.beta!r} would let the last layer keep more than the mean; pass 1 or more, the code uses 20"
            )

    def counts(self, view: StageView, layer: int) -> Sequence[int]:
        columns = zip(view.keep, view.items.counts, strict=True)
        return [falling(keep, have, layer, view.model.llm_layers, self.beta) for keep, have in columns]


def falling(keep: int, have: int, layer: int, layers: int, beta: int) -> int:
    """Entries that layer `layer` keeps of `have`, so that the mean over all `layers` is `keep`.

    >>> [falling(40, 576, layer, 5, 20) for layer in range(5)], [falling(40, 50, layer, 5, 20) for layer in range(5)]
    ([78, 59, 40, 21, 2], [50, 45, 40, 35, 30])
    """
    mirror = layers - 1 - layer
    if layer > mirror:
        return 2 * keep - falling(keep, have, mirror, layers, beta)
    reach = min(keep - max(1, keep // beta), have - keep)
    return keep + ((mirror - layer) * reach * 2 + layers - 1) // (2 * (layers - 1)) if layer < mirror else keep
