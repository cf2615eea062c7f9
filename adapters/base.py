"""The adapter protocol: what the engine has to know about a model family, and nothing about any method.

A family is one file: the class docstring draws the module tree, the body names the modules and describes the items
that an encoder call produced. Everything else (hooks, caches, positions, budgets) is the engine's. `VisionSide` is
what encoders with and without an LLM behind them have in common.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from vtc.batch.context import VisionContext
from vtc.cost.shapes import Encoded, ModelShape
from vtc.errors import UnsupportedModel
from vtc.method.base import ModelSpec
from vtc.method.layout import Kind
from vtc.method.readings import AttentionCall


class VisionSide(ABC):
    """The vision encoder of one model of one family."""

    family: ClassVar[str]
    model_classes: ClassVar[tuple[str, ...]]

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.check()

    @abstractmethod
    def check(self) -> None:
        """Refuse configurations that cannot be compressed exactly."""

    # --- modules
    @property
    @abstractmethod
    def vision_layers(self) -> Sequence[nn.Module]:
        """Vision encoder layers in order."""

    @property
    @abstractmethod
    def vision_attention(self) -> Sequence[nn.Module]:
        """Attention module of each vision encoder layer."""

    @property
    @abstractmethod
    def spec(self) -> ModelSpec:
        """Facts that methods may depend on."""

    @property
    def patch_source(self) -> nn.Module | None:
        """The module that makes rows of pictures or, in a packed encoder, of their patches [P, pixels]; None if there
        is none such.
        """
        return self.patch_projection

    @property
    def patch_projection(self) -> nn.Conv2d | None:
        """The convolution that makes patches of pictures; None where the encoder is given patches already."""
        return next((module for module in self.model.modules() if isinstance(module, nn.Conv2d)), None)

    def check_call(self, arguments: dict[str, Any]) -> None:  # noqa: B027 - most families have nothing to refuse
        """Refuse arguments of a feature call under which `spec` would not hold."""

    def prefix_tokens(self, hidden: Tensor) -> int:
        """Encoder rows in front of the patches (the class token) in a [crops, T, C] hidden state."""
        return int(self.spec.has_cls)

    @property
    def packed(self) -> bool:
        """True when the encoder runs all items as one sequence cut into attention segments, not as a batch of crops."""
        return False

    def packing(self, kind: Kind, arguments: dict[str, Any]) -> tuple[list[tuple[int, int]], Tensor | None] | None:
        """Of a packed encoder's call: rows and columns of the tokens of each crop, and their places in its sequence.

        The places are [U], of the tokens of all crops row by row, in units of the patches that make one; None where
        they are just that. None for a batch of crops.
        """
        return None

    def with_rows(self, rows: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Arguments of a call of a packed encoder's layer of which only `rows` [P'] of its sequence are left."""
        raise NotImplementedError

    # --- attention
    @property
    def looked_up(self) -> bool:
        """True where attention modules look their function up in transformers, so that it can be tapped there."""
        return True

    def attention_call(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionCall:
        """Queries and keys of a call of the attention module of `layer`; needed where nothing is looked up."""
        raise NotImplementedError

    @property
    def vision_implementation(self) -> str:
        """Name of the attention implementation; "sdpa" takes masks of truth values, "eager" additive ones alone."""
        attention: Any = self.vision_attention[0]
        return attention.config._attn_implementation or "eager"

    @property
    def masked(self) -> Sequence[nn.Module]:
        """The module of each layer whose call takes the mask of its keys."""
        return self.vision_layers

    def with_mask(self, mask: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Arguments of a call of such a module with `mask` [crops, 1, 1, T] on its keys."""
        if len(args) > 1:
            return (args[0], mask, *args[2:]), kwargs
        return args, {**kwargs, "attention_mask": mask}

    # --- pooling
    @property
    def pool(self) -> nn.Module | None:
        """The module that pools the rows left and takes a mask of them; None where there is none such."""
        return None

    def with_rows_hidden(self, held: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Arguments of a call of `pool` that hide rows; held: [crops, T], False where a row is padding."""
        raise NotImplementedError


class Adapter(VisionSide):
    """One model of one family. Raises UnsupportedModel on construction where compression would not be exact."""

    modalities: ClassVar[tuple[Kind, ...]] = ("image",)
    towers: ClassVar[tuple[str, ...]]
    references: ClassVar[tuple[ModelSpec, ...]]
    """Facts of a published checkpoint for each tower, so that tables can be made without loading anything."""

    # --- modules
    @property
    def backbone(self) -> Any:
        """The module that merges visual features into the text embeddings and calls the language model."""
        return self.model.model

    @property
    def language_model(self) -> Any:
        """The decoder stack, with `layers` and `rotary_emb`."""
        return self.backbone.language_model

    @property
    def layers(self) -> Sequence[nn.Module]:
        """LLM layers that run."""
        count = self.language_model.config.num_hidden_layers
        return list(self.language_model.layers[:count])

    @property
    def llm_attention(self) -> list[nn.Module]:
        """Attention module of each LLM layer."""
        return [layer.self_attn for layer in self.layers]  # type: ignore[misc]

    @property
    def llm_mlp(self) -> list[nn.Module]:
        """Feed-forward module of each LLM layer, given rows behind their norm."""
        return [layer.mlp for layer in self.layers]  # type: ignore[misc]

    def attention_input(self, layer: int, hidden: Tensor) -> Tensor:
        """[B, L, D] what the attention of LLM layer `layer` is given when `hidden` enters the layer."""
        block: Any = self.layers[layer]
        return block.input_layernorm(hidden)  # type: ignore[no-any-return]

    def final_norm(self, hidden: Tensor) -> Tensor:
        """[..., D] rows as the norm behind the last LLM layer leaves them."""
        return self.language_model.norm(hidden)  # type: ignore[no-any-return]

    @property
    @abstractmethod
    def projector(self) -> nn.Module:
        """The module that maps encoder features to LLM rows, before any packing."""

    # --- facts
    @property
    def placeholders(self) -> dict[Kind, int]:
        """Placeholder token id of each modality."""
        ids = {kind: getattr(self.model.config, f"{kind}_token_id", None) for kind in self.modalities}
        return {kind: token for kind, token in ids.items() if token is not None}

    @classmethod
    def shape(cls, config: Any) -> ModelShape:
        """The sizes of a model with this configuration, which its cost depends on.

        Raises UnsupportedModel where a family does not tell them; nothing but costs needs them.
        """
        raise UnsupportedModel(
            f"the adapter of {cls.family!r} tells no sizes, so nothing can be said about costs; give it a classmethod "
            "`shape(config)` and a method `encoded(inputs)`"
        )

    def encoded(self, inputs: Mapping[str, Any]) -> Encoded:
        """What the vision tower runs on in a call with these inputs; needed where `shape` is given."""
        raise NotImplementedError

    @abstractmethod
    def describe(self, kind: Kind, arguments: dict[str, Any], output: Any) -> VisionContext:
        """Items of one get_{kind}_features call, from its bound arguments and its output."""

    def unit(self, kind: Kind) -> int:
        """Patches along a side of the square that an LLM token of this modality is made of; 0 where squares overlap."""
        return 1

    def pools(self, kind: Kind) -> bool:
        """Whether the model pools what its projector makes of the patches of this modality, crop by crop, to tokens."""
        return False

    def gathering(self, kind: Kind) -> tuple[nn.Module, Literal["before", "behind"]] | None:
        """Where encoder rows are joined by their places ahead of the projector, so that all have to be there: before or
        behind which module. None where nothing joins them, or the projector itself joins neighbours.
        """
        return None

    @property
    def projectors(self) -> Sequence[nn.Module]:
        """All modules that make LLM rows of encoder rows; `projector` and those of deeper features."""
        return (self.projector,)

    @property
    def deepstack(self) -> bool:
        """True when visual rows are also added inside the LLM's first layers."""
        return False

    def learn(self, processor: Any) -> None:
        """Take from the checkpoint's processor what prompts are written with, where `regroup` has to know it."""

    def regroup(
        self,
        contexts: tuple[VisionContext, ...],
        placeholders: Tensor,
        ids: Tensor | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> tuple[VisionContext, ...]:
        """Join encoder entries to items where only the prompt shows which belong together.

        placeholders: [K, B, S] bool per kind. ids: [B, S] of the prompt, None where embeddings were given instead.
        sizes: height and width in pixels of every picture of the prompts, as the caller gave them. The default leaves
        the contexts as they are.
        """
        return contexts

    def check(self) -> None:
        """Refuse configurations for which pruning would not equal masking."""
        text = self.language_model.config
        kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
        window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
        if kinds != {"full_attention"} or window:
            raise UnsupportedModel(
                f"{type(self.model).__name__} has sliding-window or linear attention layers ({sorted(kinds)}, "
                f"sliding_window={window}); the physical order of rows would differ from their positions there. "
                "Load the checkpoint with sliding_window=None if its context allows it"
            )
