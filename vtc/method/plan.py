"""Where a method acts and what it needs there: stages, readings by layer, the facts about a model it may depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from vtc.method.readings import LLMReading, VisionReading
from vtc.method.rows import Rows

Positions = Literal["preserve", "compact", "compact_input"]
"""Position ids of what is left: the original ones, renumbered without gaps at every stage, or renumbered where the
tokens enter the LLM and unchanged inside it."""


@dataclass(frozen=True)
class EncoderStage:
    """Before vision-encoder layer `layer` (0-based): the encoder layers from there on run on fewer tokens.

    The layer behind the feature layer means before the projector.

    >>> EncoderStage(12)
    EncoderStage(layer=12)
    """

    layer: int


@dataclass(frozen=True)
class CacheStage:
    """After the prefill: rows of dropped tokens leave the KV cache of the layers from `from_layer` on.

    Up to the next such stage of the plan: with one for each layer, every layer has a kept set of its own. A stage for a
    layer sees the tokens that reached the LLM's end, and readings of all layers.

    >>> CacheStage(from_layer=2), AFTER_PREFILL
    (CacheStage(from_layer=2), CacheStage(from_layer=0))
    """

    from_layer: int = 0


Stage = int | EncoderStage | CacheStage
"""An int k is "before LLM layer k"; 0, before the LLM, is also called PRE_LLM."""

PRE_LLM = 0
PIXELS = -1
"""The encoder layer under which pixels are read."""
AFTER_PREFILL = CacheStage()


@dataclass(frozen=True)
class Needs:
    """What to record: 0-based layer of the vision encoder or of the LLM -> a reading or several.

    PIXELS (-1), in front of the encoder's layers, has `Rows.PIXELS` alone. pairs: CLIP models by name or folder, each
    the one that the encoder is a half of, whose text features of the question `StageView.pair` shows; None stands for
    one that nobody named yet. unpooled: what the projector made of patches that the model pools, `StageView.patches`.

    >>> from vtc import Rows
    >>> (Needs(vision={22: Rows.CLS}) | Needs(llm={1: Rows.LAST})).llm_pairs
    ((1, LastRow()),)
    """

    vision: Mapping[int, VisionReading | tuple[VisionReading, ...]] = field(default_factory=dict)
    llm: Mapping[int, LLMReading | tuple[LLMReading, ...]] = field(default_factory=dict)
    pairs: tuple[str | None, ...] = ()
    unpooled: bool = False

    @property
    def vision_pairs(self) -> tuple[tuple[int, VisionReading], ...]:
        """(layer, reading) of everything recorded in the vision encoder."""
        return tuple((layer, one) for layer, some in self.vision.items() for one in each(some))

    @property
    def llm_pairs(self) -> tuple[tuple[int, LLMReading], ...]:
        """(layer, reading) of everything recorded in the LLM."""
        return tuple((layer, one) for layer, some in self.llm.items() for one in each(some))

    def __or__(self, other: Needs) -> Needs:
        """Both together."""
        return Needs(
            grouped([*self.vision_pairs, *other.vision_pairs]),
            grouped([*self.llm_pairs, *other.llm_pairs]),
            tuple(dict.fromkeys((*self.pairs, *other.pairs))),
            self.unpooled or other.unpooled,
        )


R = TypeVar("R")


def each(some: R | tuple[R, ...]) -> tuple[R, ...]:
    """One or several as a tuple."""
    return some if isinstance(some, tuple) else (some,)


def grouped(pairs: Sequence[tuple[int, R]]) -> dict[int, R | tuple[R, ...]]:
    """Pairs of layer and reading as a mapping, nothing twice."""
    layers: dict[int, dict[R, None]] = {}
    for layer, reading in pairs:
        layers.setdefault(layer, {})[reading] = None
    return {layer: tuple(readings) for layer, readings in layers.items()}


@dataclass(frozen=True)
class ModelSpec:
    """The facts about a model that a method may depend on; layers are 0-based.

    feature_layer: the encoder layer whose output is projected for the LLM. full_attention_layers: encoder layers in
    which a patch sees its whole image (all of them unless the encoder uses windows). mrope: multi-axis positions.
    encoder_stages: methods may act inside the encoder. packed: it runs all pictures as one sequence, in which keys
    cannot be told how much they count. joins: some tokens of the LLM are made of several patches. single_crop: an image
    is one crop. clip: the encoder is one half of a CLIP, which a method may name as its pair.
    width, vision_width: hidden sizes of the LLM and of the encoder, 0 where no model is loaded.

    >>> import vtc
    >>> spec = vtc.adapters.families()["llava"].references[0]
    >>> spec.llm_layers, spec.feature_layer, spec.has_cls
    (32, 22, True)
    """

    family: str
    vision_layers: int
    feature_layer: int
    has_cls: bool
    full_attention_layers: tuple[int, ...]
    llm_layers: int
    mrope: bool = False
    encoder_stages: bool = False
    single_crop: bool = False
    width: int = 0
    packed: bool = False
    joins: bool = False
    clip: bool = False
    vision_width: int = 0

    @property
    def key_layer(self) -> int:
        """The last encoder layer up to the feature layer that sees the whole image."""
        return max(layer for layer in self.full_attention_layers if layer <= self.feature_layer)

    @property
    def patch_attention(self) -> VisionReading:
        """Attention that each patch draws: the class token's, or that of all queries where there is none."""
        return Rows.CLS if self.has_cls else Rows.RECEIVED


@dataclass(frozen=True)
class Plan:
    """Where a method acts on a given model, what it needs there, and its default position policy.

    restores: behind the encoder every patch has a row again (`Selection.restored`). skips: stages inside the LLM whose
    tokens that are not kept skip that one layer, and no more: they go around it as they are, have no entry in its KV
    cache, and are back behind it. gains: what is selected there may tell `Selection.gains`; the MLPs of these layers
    then carry hooks.

    >>> import vtc
    >>> vtc.create("fastv", layer=3).plan(vtc.adapters.families()["llava"].references[0]).stages
    (3,)
    """

    stages: tuple[Stage, ...]
    needs: Needs
    positions: Positions
    restores: bool = False
    skips: tuple[int, ...] = ()
    gains: bool = False
