"""The sizes that a model's cost depends on, without any weights: language model, vision tower, projector.

Counts are multiply-accumulates unless a name says operations; one multiply-accumulate is two operations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: how many there are, how many a token takes, their width, and layers that have none."""

    count: int
    active: int
    width: int
    dense: frozenset[int] = frozenset()


@dataclass(frozen=True)
class LLMShape:
    """A decoder stack. intermediate: width of its feed-forward part, which has three matrices. kind: `model_type`."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    kind: str = "llama"
    experts: Experts | None = None

    @property
    def query_width(self) -> int:
        """Width of all queries of a token."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all keys of a token."""
        return self.kv_heads * self.head_dim

    @property
    def projections(self) -> int:
        """Weights of the four attention matrices of a layer."""
        return self.hidden * 2 * (self.query_width + self.kv_width)

    def has_experts(self, layer: int) -> bool:
        """Whether the feed-forward part of this layer is a mixture of experts."""
        return self.experts is not None and layer not in self.experts.dense

    def ffn_width(self, layer: int) -> int:
        """Width of the feed-forward part that one token passes in this layer."""
        if self.experts is not None and self.has_experts(layer):
            return self.experts.active * self.experts.width
        return self.intermediate

    def per_token(self, layer: int) -> int:
        """Multiply-accumulates of one token with the weights of a layer, a router included."""
        router = self.hidden * self.experts.count if self.experts is not None and self.has_experts(layer) else 0
        return self.projections + 3 * self.hidden * self.ffn_width(layer) + router

    def weights(self, layer: int) -> int:
        """All matrix weights of a layer."""
        if self.experts is None or not self.has_experts(layer):
            return self.per_token(layer)
        return self.projections + self.hidden * self.experts.count * (1 + 3 * self.experts.width)

    def kv_bytes(self, tokens: float, element: int = 2) -> float:
        """Bytes of the keys and values of `tokens` cached rows, summed over layers; element: bytes of one number."""
        return 2 * self.kv_width * element * tokens


@dataclass(frozen=True)
class TowerShape:
    """A vision transformer. inputs: numbers per patch. inner: width of all heads. matrices: of its feed-forward part.

    prefix: rows in front of the patches. full: layers whose patches see the whole image, None for all. pooling: has an
    attention-pooling head that runs though nothing reads it.
    """

    hidden: int
    intermediate: int
    layers: int
    inner: int
    inputs: int
    matrices: int = 2
    prefix: int = 0
    full: tuple[int, ...] | None = None
    pooling: bool = False

    @property
    def per_row(self) -> int:
        """Multiply-accumulates of one row with the weights of a layer."""
        return 4 * self.hidden * self.inner + self.matrices * self.hidden * self.intermediate

    def is_full(self, layer: int) -> bool:
        """Whether attention in this layer is over the whole image."""
        return self.full is None or layer in self.full


@dataclass(frozen=True)
class ProjectorShape:
    """Two matrices, `inputs` x `hidden` and `hidden` x `outputs`, applied to groups of `merged` rows.

    copies: how many such projectors see the same number of rows (those for deep features included). cut: tower rows per
    crop that it never sees.
    """

    inputs: int
    hidden: int
    outputs: int
    merged: int = 1
    copies: int = 1
    cut: int = 0

    @property
    def per_token(self) -> int:
        """Multiply-accumulates of one projected token."""
        return self.copies * (self.inputs * self.hidden + self.hidden * self.outputs)


@dataclass(frozen=True)
class PairShape:
    """The text half of a CLIP pair and what projects rows of its vision tower, beside a model.

    Of the text tower: layers, hidden: its width, per_row: weights of a layer's matrices, length: tokens that every text
    is padded to. inputs: width of the vision tower. outputs: of both projections. weights: parameters that are held.
    """

    layers: int
    hidden: int
    per_row: int
    length: int
    inputs: int
    outputs: int
    weights: int

    def operations(self, tokens: float) -> float:
        """Of one text and `tokens` projected rows, two operations per multiply-accumulate."""
        layer = 2 * self.length * self.per_row + 4 * self.length**2 * self.hidden
        return self.layers * layer + 2 * self.outputs * (self.hidden + tokens * self.inputs)


@dataclass(frozen=True)
class Encoded:
    """What the vision tower runs on. rows: patches and class tokens of all crops. pairs: sum of squared lengths of the
    sequences inside which rows attend, window_pairs: the same in layers with windows. projected: tokens that leave the
    projector.
    """

    crops: float = 0
    patches: float = 0
    rows: float = 0
    pairs: float = 0
    window_pairs: float = 0
    projected: float = 0

    def __add__(self, other: Encoded) -> Encoded:
        return Encoded(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def scaled(self, share: float) -> Encoded:
        """A part of it, such as that of one question of a batch."""
        return self if share == 1 else Encoded(*(share * value for value in vars(self).values()))


NOTHING = Encoded()
"""Of a prompt without pictures."""


@dataclass(frozen=True)
class ModelShape:
    """A vision-language model.

    crop_patches: patches of one crop, None where images of any size are one sequence of patches. visual: visual tokens
    of a usual prompt, for tables. window: patches along a side of an attention window. source: where the numbers stand.
    """

    name: str
    llm: LLMShape
    tower: TowerShape
    projector: ProjectorShape
    crop_patches: int | None
    visual: int
    source: str = ""
    window: int | None = None
    family: str = field(default="", compare=False)

    def crops(self, crops: int, patches: int, projected: int | None = None) -> Encoded:
        """`crops` pictures of `patches` each; projected: tokens that leave the projector, by default all of them."""
        rows = patches + self.tower.prefix
        tokens = crops * (rows - self.projector.cut) // self.projector.merged if projected is None else projected
        return Encoded(crops, crops * patches, crops * rows, crops * rows**2, crops * rows**2, tokens)

    def frames(self, frames: int, height: int, width: int) -> Encoded:
        """An item of `frames` x `height` x `width` patches, each frame one sequence."""
        patches = height * width
        side = self.window or max(height, width)
        windows = [min(side, height - top) * min(side, width - left)
                   for top in range(0, height, side) for left in range(0, width, side)]  # fmt: skip
        return Encoded(
            frames, frames * patches, frames * patches, frames * patches**2, frames * sum(n * n for n in windows),
            frames * patches // self.projector.merged,
        )  # fmt: skip

    def encoded(self, visual: int, crops: int | None = None) -> Encoded:
        """What the tower runs on for so many visual tokens: whole crops, or one nearly square picture.

        crops: how many of these or frames there are, where margins, separators or pooling hide it.
        """
        if not visual:
            return NOTHING
        if self.crop_patches is None:
            frames, merge = crops or 1, math.isqrt(self.projector.merged)
            tokens = math.ceil(visual / frames)
            height = max(n for n in range(1, math.isqrt(tokens) + 1) if tokens % n == 0)
            return self.frames(frames, merge * height, merge * (tokens // height))
        per_crop = self.crop_patches // self.projector.merged
        return self.crops(crops or math.ceil(visual / per_crop), self.crop_patches)

    def called(self, name: str) -> ModelShape:
        """The same under another name."""
        return replace(self, name=name)
