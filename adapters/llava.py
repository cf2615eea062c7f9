"""LLaVA: one crop per image, a CLIP, SigLIP or DINOv2 tower, one LLM token per patch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtc.adapters.base import Adapter
from vtc.adapters.compat import refuse_other_layer, refuse_wrong_order, takes_mask
from vtc.adapters.shapes import llm_shape, tower_shape
from vtc.adapters.towers import CLIP, DINOV2, SIGLIP, Tower
from vtc.batch.context import VisionContext
from vtc.cost.shapes import Encoded, ModelShape, ProjectorShape
from vtc.errors import UnsupportedModel
from vtc.method.base import ModelSpec
from vtc.method.layout import Kind, VisualItem
from vtc.ops.hashing import fingerprint

TOWERS = {"clip_vision_model": CLIP, "siglip_vision_model": SIGLIP, "dinov2": DINOV2}
"""Supported tower types."""


class LlavaAdapter(Adapter):
    """LlavaForConditionalGeneration (LLaVA-1.5 and everything trained with its recipe).

    model
    ├── vision_tower (.vision_model up to transformers 5.17) .encoder.layers[i].self_attn, or as its `Tower` says
    ├── multi_modal_projector
    └── language_model .layers[i].self_attn
    lm_head
    """

    family = "llava"
    model_classes: ClassVar[tuple[str, ...]] = ("LlavaForConditionalGeneration",)
    towers: ClassVar[tuple[str, ...]] = ("CLIP", "SigLIP", "DINOv2")
    single_crop: ClassVar[bool] = True
    usual_crops: ClassVar[int] = 1
    """Crops of a usual picture, for tables."""
    references: ClassVar[tuple[ModelSpec, ...]] = (
        ModelSpec(
            "llava", 24, 22, True, tuple(range(24)), 32, encoder_stages=True, single_crop=True, clip=True
        ),  # LLaVA-1.5-7B, CLIP-L/14-336
        ModelSpec(
            "llava", 27, 26, False, tuple(range(27)), 32, encoder_stages=True, single_crop=True
        ),  # a SigLIP-So400m tower
        ModelSpec(
            "llava", 12, 10, True, tuple(range(12)), 30, encoder_stages=True, single_crop=True
        ),  # mini-llava, DINOv2-S/14
    )

    def check(self) -> None:
        """Refuse towers other than those of TOWERS, and what the base class refuses."""
        super().check()
        tower = self.model.config.vision_config.model_type
        if tower not in TOWERS:
            raise UnsupportedModel(
                f"LLaVA with a {tower!r} tower is not supported; supported towers: {', '.join(sorted(TOWERS))}"
            )

    @property
    def vision_layers(self) -> Sequence[nn.Module]:
        return self._tower.layers_of(self.backbone.vision_tower)

    @property
    def vision_attention(self) -> Sequence[nn.Module]:
        return self._tower.attention_of(self.backbone.vision_tower)

    @property
    def _tower(self) -> Tower:
        return TOWERS[self.model.config.vision_config.model_type]

    @property
    def projector(self) -> nn.Module:
        return self.backbone.multi_modal_projector  # type: ignore[no-any-return]

    @property
    def spec(self) -> ModelSpec:
        config = self.model.config
        layers = config.vision_config.num_hidden_layers
        index, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
        has_cls = self._tower.has_cls
        deepest = max(i if i >= 0 else layers + 1 + i for i in ([index] if isinstance(index, int) else index))
        return ModelSpec(
            family=self.family,
            vision_layers=layers,
            feature_layer=deepest - 1,  # hidden_states[0] is the embedding output
            has_cls=has_cls,
            full_attention_layers=tuple(range(layers)),
            llm_layers=config.text_config.num_hidden_layers,
            # Without a class token "default" cuts the first patch, which may be gone then.
            encoder_stages=isinstance(index, int)
            and (has_cls or strategy == "full")
            and takes_mask(self.vision_layers[0]),
            joins=any(self.unit(kind) != 1 for kind in self.modalities),
            single_crop=self.single_crop,
            clip=self._tower is CLIP,
            width=config.text_config.hidden_size,
            vision_width=config.vision_config.hidden_size,
        )

    @classmethod
    def shape(cls, config: Any) -> ModelShape:
        vision, index = config.vision_config, config.vision_feature_layer
        tower = tower_shape(
            vision,
            patch=vision.patch_size**2,
            prefix=int(vision.model_type in TOWERS and TOWERS[vision.model_type].has_cls),
            pooling=vision.model_type == "siglip_vision_model" and getattr(vision, "vision_use_head", True),
        )
        llm, patches = llm_shape(config), (vision.image_size // vision.patch_size) ** 2
        projector = ProjectorShape(
            inputs=tower.hidden * (1 if isinstance(index, int) else len(index)),
            hidden=llm.hidden,
            outputs=llm.hidden,
            cut=int(config.vision_feature_select_strategy == "default"),
        )
        return ModelShape("", llm, tower, projector, patches, cls.usual_crops * patches, family=cls.family)

    def encoded(self, inputs: Mapping[str, Any]) -> Encoded:
        pixels = inputs.get("pixel_values")
        return Encoded() if pixels is None else self._crops(pixels, pixels.shape[0])

    def _crops(self, pixels: Tensor, crops: int, projected: int | None = None) -> Encoded:
        """`crops` pictures of the size of `pixels` [..., H, W]; projected: tokens of each behind the projector."""
        patch = self.model.config.vision_config.patch_size
        patches = pixels.shape[-2] // patch * (pixels.shape[-1] // patch)
        shape = self.shape(self.model.config)
        return shape.crops(crops, patches, None if projected is None else crops * projected)

    def check_call(self, arguments: dict[str, Any]) -> None:
        refuse_other_layer(arguments, self.model.config.vision_feature_layer)

    def regroup(
        self,
        contexts: tuple[VisionContext, ...],
        placeholders: Tensor,
        ids: Tensor | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> tuple[VisionContext, ...]:
        for context in contexts:
            refuse_wrong_order(context, placeholders[list(self.placeholders).index(context.kind)])
        return contexts

    def describe(self, kind: Kind, arguments: dict[str, Any], output: Any) -> VisionContext:
        pixels: Tensor = arguments["pixel_values"]
        strategy = arguments.get("vision_feature_select_strategy") or self.model.config.vision_feature_select_strategy
        first = 1 if strategy == "default" else 0
        patch = self.model.config.vision_config.patch_size
        rows, cols = pixels.shape[-2] // patch, pixels.shape[-1] // patch
        item = _item(rows, cols, has_cls=self.spec.has_cls, first=first, device=pixels.device)
        return VisionContext(
            kind=kind,
            items=[item] * pixels.shape[0],
            fingerprint=fingerprint(pixels),
            to_tokens=lambda values: list(values[:, first:]),
        )


def _item(rows: int, cols: int, *, has_cls: bool, first: int, device: torch.device) -> VisualItem:
    """Geometry of one image whose encoder emits [class token,] rows * cols patches, of which `first` rows are cut."""
    patch = torch.arange(-int(has_cls), rows * cols, device=device)[first:]
    count = patch.numel()
    full = count == rows * cols and not (has_cls and first == 0)
    return VisualItem(
        kind="image",
        n_tokens=count,
        crop=torch.zeros(count, dtype=torch.long, device=device),
        row=torch.where(patch < 0, -1, patch // cols).float(),
        col=torch.where(patch < 0, -1, patch % cols).float(),
        newline=torch.zeros(count, dtype=torch.bool, device=device),
        n_crops=1,
        crop_grid=(rows, cols),
        grid=(1, rows, cols) if full else None,
    )
