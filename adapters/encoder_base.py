"""The adapter protocol of vision encoders without an LLM behind them: what the engine has to know about one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from vtc.adapters.base import VisionSide
from vtc.adapters.compat import takes_mask
from vtc.cost.shapes import TowerShape
from vtc.errors import UnsupportedCall, UnsupportedModel
from vtc.method.base import ModelSpec


class EncoderAdapter(VisionSide):
    """One encoder of one family: class and register tokens, then one row per patch, all layers of one length.

    Raises UnsupportedModel on construction for configurations that are built otherwise.
    """

    ways_around: ClassVar[tuple[str, ...]] = ()
    """Methods of `encoder` that run its layers without calling it."""

    is_clip: ClassVar[bool] = False
    """It is the vision half of a CLIP."""

    @classmethod
    def of(cls, model: nn.Module) -> EncoderAdapter:
        """The adapter of `model`: this one, or another where models of one class have encoders of several kinds."""
        return cls(model)

    @property
    @abstractmethod
    def has_cls(self) -> bool:
        """A class token stands in front of the patches."""

    @property
    @abstractmethod
    def encoder(self) -> Any:
        """The module one call of which takes pixels through all layers; everything else calls it."""

    @property
    def pools_patches(self) -> bool:
        """True where the pooled output is made of the patches, not of the class token alone."""
        return not self.has_cls

    @property
    def spec(self) -> ModelSpec:
        layers = len(self.vision_layers)
        return ModelSpec(
            family=self.family,
            vision_layers=layers,
            feature_layer=layers - 1,
            has_cls=self.has_cls,
            full_attention_layers=tuple(range(layers)),
            llm_layers=0,
            encoder_stages=self.masks_keys,
            single_crop=True,
            clip=self.is_clip,
        )

    @property
    def attention_pooled(self) -> bool:
        """True where an attention head of its own pools the last layer's rows."""
        return False

    @property
    def patch_embedding(self) -> nn.Conv2d:
        """The convolution that cuts an image into patches."""
        return next(module for module in self.encoder.modules() if isinstance(module, nn.Conv2d))

    @property
    def shape(self) -> TowerShape:
        """The sizes that the cost of an image depends on; a layer's matrices count whatever they are called."""
        weight, layer = self.patch_embedding.weight, self.vision_layers[0]
        hidden, inputs = weight.shape[0], weight[0].numel()
        matrices = sum(parameter.numel() for parameter in layer.parameters() if parameter.ndim == 2)
        return TowerShape(
            hidden=hidden,
            intermediate=(matrices - 4 * hidden**2) // (2 * hidden),
            layers=len(self.vision_layers),
            inner=hidden,
            inputs=inputs,
            prefix=self.prefix_tokens(weight),
            pooling=self.attention_pooled,
        )

    @property
    def text_layers(self) -> Sequence[nn.Module]:
        """Layers of the text tower trained with the encoder; none where there is no such tower."""
        return ()

    def project(self, rows: Tensor) -> Tensor:
        """[..., D] rows that leave the layers -> [..., C] what texts are compared with, each as if it were pooled.

        Raises UnsupportedModel where pictures are pooled from other rows than the class token's.
        """
        raise UnsupportedModel(
            f"{type(self.model).__name__} does not project single rows to where texts are, its pooled output is made "
            "otherwise; give a CLIP that pools its class token"
        )

    def check_call(self, arguments: dict[str, Any]) -> None:
        """Refuse arguments of a call of `encoder` that would not fit what is left."""
        if arguments.get("attention_mask") is not None:
            raise UnsupportedCall(
                "an attention_mask over all patches was passed to this encoder, which does not fit those that a method "
                "leaves; leave it out, or leave the `with` block first"
            )

    @property
    def masks_keys(self) -> bool:
        """True where a layer can be told which keys to hide and how much they count."""
        return takes_mask(self.vision_layers[0])
