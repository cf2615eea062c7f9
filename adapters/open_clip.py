"""open_clip's CLIP with its own vision transformer. Found by the names of its classes, so nothing imports open_clip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional

from vtc.adapters.encoder_base import EncoderAdapter
from vtc.adapters.text_towers import text_layers
from vtc.adapters.timm import TimmEncoder
from vtc.errors import UnsupportedCall, UnsupportedModel
from vtc.method.readings import AttentionCall


class OpenClipEncoder(EncoderAdapter):
    """open_clip.model.CLIP and CustomTextCLIP with a VisionTransformer of open_clip's own.

    model.visual
    ├── conv1, class_embedding, positional_embedding, ln_pre
    ├── transformer.resblocks[i].attn, a torch.nn.MultiheadAttention
    └── ln_post and what pools: the class token, the mean of the patches or attention
    """

    family = "open_clip"
    model_classes: ClassVar[tuple[str, ...]] = ("open_clip.model.CLIP", "open_clip.model.CustomTextCLIP")
    is_clip = True
    ways_around: ClassVar[tuple[str, ...]] = ("forward_intermediates",)

    @classmethod
    def of(cls, model: Any) -> EncoderAdapter:
        """Towers of timm, which have a trunk, are another adapter's."""
        return TimmEncoder(model) if hasattr(model.visual, "trunk") else cls(model)

    def check(self) -> None:
        """Refuse ResNets, and blocks with an attention of another kind."""
        visual, name = self.model.visual, f"open_clip's {type(self.model).__name__}"
        blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
        if blocks is None or not hasattr(visual, "class_embedding"):
            raise UnsupportedModel(
                f"{name} with a {type(visual).__name__} for images is not supported; choose a model whose images go "
                "through open_clip's own VisionTransformer, such as ViT-B-32, or timm's, such as ViT-B-16-SigLIP"
            )
        attention = blocks[0].attn
        if not isinstance(attention, nn.MultiheadAttention) or not attention.batch_first:
            raise UnsupportedModel(
                f"{name} with {type(attention).__name__} in its blocks is not supported, its keys are made otherwise; "
                "choose a model with torch.nn.MultiheadAttention, such as ViT-B-32"
            )

    @property
    def has_cls(self) -> bool:
        return True

    @property
    def encoder(self) -> Any:
        return self.model.visual

    @property
    def vision_layers(self) -> Sequence[nn.Module]:
        return list(self.model.visual.transformer.resblocks)

    @property
    def vision_attention(self) -> Sequence[nn.Module]:
        return [block.attn for block in self.model.visual.transformer.resblocks]

    @property
    def pools_patches(self) -> bool:
        return self.model.visual.attn_pool is not None or self.model.visual.pool_type != "tok"

    @property
    def attention_pooled(self) -> bool:
        return self.model.visual.attn_pool is not None

    @property
    def text_layers(self) -> Sequence[nn.Module]:
        return text_layers(self.model)

    def project(self, rows: Tensor) -> Tensor:
        if self.pools_patches:
            return super().project(rows)
        visual = self.model.visual
        rows = visual.ln_post(rows)
        return rows if visual.proj is None else rows @ visual.proj

    def check_call(self, arguments: dict[str, Any]) -> None:
        if self.model.visual.transformer.grad_checkpointing:
            raise UnsupportedCall(
                "gradient checkpointing of open_clip recomputes a block together with its hooks, after the call they "
                "belong to has ended; switch it off: model.set_grad_checkpointing(False)"
            )

    # --- attention
    @property
    def looked_up(self) -> bool:
        return False

    def attention_call(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionCall:
        attention: Any = self.vision_attention[layer]
        hidden: Tensor = args[0] if args else kwargs["query"]
        width, heads = attention.embed_dim, attention.num_heads
        weight, bias = attention.in_proj_weight[: 2 * width], attention.in_proj_bias
        projected = functional.linear(hidden, weight, None if bias is None else bias[: 2 * width])
        query, key = projected.reshape(*hidden.shape[:2], 2, heads, -1).permute(2, 0, 3, 1, 4)
        mask = kwargs.get("key_padding_mask")
        return AttentionCall(query, key, None if mask is None else mask[:, None, None], query.shape[-1] ** -0.5, False)

    @property
    def vision_implementation(self) -> str:
        return "eager"

    @property
    def masked(self) -> Sequence[nn.Module]:
        return self.vision_attention

    def with_mask(self, mask: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "key_padding_mask": mask[:, 0, 0]}

    @property
    def masks_keys(self) -> bool:
        return True
