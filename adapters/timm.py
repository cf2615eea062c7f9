"""timm's VisionTransformer, alone or as the image tower of an open_clip model, as in its SigLIP models.

Found by the names of classes, so nothing imports timm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtc.adapters.encoder_base import EncoderAdapter
from vtc.adapters.text_towers import text_layers
from vtc.errors import UnsupportedCall, UnsupportedModel
from vtc.method.readings import AttentionCall


class TimmEncoder(EncoderAdapter):
    """A VisionTransformer of timm, as a model or as `visual.trunk` of open_clip's CLIP or CustomTextCLIP.

    model or model.visual.trunk
    ├── patch_embed, cls_token, reg_token, pos_embed, norm_pre
    ├── blocks[i].attn, an Attention of timm
    └── norm, what pools (the class token, the patches, or the attention of attn_pool), fc_norm, head
    """

    family = "timm"
    model_classes: ClassVar[tuple[str, ...]] = (
        "timm.models.VisionTransformer", "open_clip.model.CLIP", "open_clip.model.CustomTextCLIP",
    )  # fmt: skip
    ways_around: ClassVar[tuple[str, ...]] = ("forward_features", "forward_intermediates", "get_intermediate_layers")

    def check(self) -> None:
        """Refuse other networks of timm, and parts whose patches, queries or masks would be made otherwise."""
        trunk, name = self.encoder, type(self.model).__name__
        if not any(cls.__name__ == "VisionTransformer" for cls in type(trunk).__mro__):
            raise UnsupportedModel(
                f"open_clip's {name} with timm's {type(trunk).__name__} for images is not supported; choose a model "
                "whose images go through timm's VisionTransformer, such as ViT-B-16-SigLIP, or open_clip's own, such "
                "as ViT-B-32"
            )
        for part, known in self._parts(trunk):
            if type(part).__name__ != known:
                raise UnsupportedModel(
                    f"this {name} has a {type(part).__name__} where timm's VisionTransformer usually has {known}, so "
                    "it is not known what it makes of fewer patches; choose a model with the usual parts, such as "
                    "open_clip's ViT-B-16-SigLIP or timm's vit_base_patch16_224"
                )

    @staticmethod
    def _parts(trunk: Any) -> Iterator[tuple[nn.Module, str]]:
        """What an exact answer depends on, and the class of it that is known."""
        yield trunk.patch_embed, "PatchEmbed"
        for block in trunk.blocks:
            yield getattr(block, "attn", block), "Attention"
        if trunk.attn_pool is not None:
            yield trunk.attn_pool, "AttentionPoolLatent"

    @property
    def has_cls(self) -> bool:
        return bool(self.encoder.has_class_token)

    @property
    def encoder(self) -> Any:
        return self.model.visual.trunk if hasattr(self.model, "visual") else self.model

    @property
    def vision_layers(self) -> Sequence[nn.Module]:
        return list(self.encoder.blocks)

    @property
    def vision_attention(self) -> Sequence[nn.Module]:
        return [block.attn for block in self.encoder.blocks]

    def prefix_tokens(self, hidden: Tensor) -> int:
        return int(self.encoder.num_prefix_tokens)

    @property
    def pools_patches(self) -> bool:
        return bool(self.encoder.global_pool != "token")

    @property
    def attention_pooled(self) -> bool:
        return self.pool is not None

    @property
    def pool(self) -> nn.Module | None:
        head: nn.Module | None = self.encoder.attn_pool
        return head

    def with_rows_hidden(self, held: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rows = args[0]  # with the class and register tokens or without
        bias = torch.zeros_like(held, dtype=rows.dtype).masked_fill(~held, torch.finfo(rows.dtype).min)
        return args, {**kwargs, "attn_mask": bias[:, None, None, -rows.shape[1] :]}

    def check_call(self, arguments: dict[str, Any]) -> None:
        trunk = self.encoder
        if arguments.get("attn_mask") is not None or arguments.get("is_causal"):
            raise UnsupportedCall(
                "attn_mask or is_causal was passed to this encoder, which does not fit the patches that a method "
                "leaves; leave it out, or leave the `with` block first"
            )
        if trunk.grad_checkpointing:
            raise UnsupportedCall(
                "gradient checkpointing of timm recomputes a block together with its hooks, after the call they belong "
                "to has ended; switch it off: model.set_grad_checkpointing(False)"
            )
        if trunk.training and not isinstance(trunk.patch_drop, nn.Identity):
            raise UnsupportedCall(
                "patch dropout removes patches of this encoder in training before a method sees them, so nobody knows "
                "their places; call model.eval(), or create the model with patch_drop_rate=0"
            )

    # --- the text tower of open_clip
    @property
    def text_layers(self) -> Sequence[nn.Module]:
        return text_layers(self.model)

    def project(self, rows: Tensor) -> Tensor:
        if self.pools_patches or not hasattr(self.model, "visual"):
            return super().project(rows)
        trunk = self.encoder
        projected: Tensor = self.model.visual.head(trunk.head(trunk.fc_norm(trunk.norm(rows))))
        return projected

    # --- attention
    @property
    def looked_up(self) -> bool:
        return False

    def attention_call(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionCall:
        attention: Any = self.vision_attention[layer]
        projected = attention.qkv(args[0]).unflatten(-1, (3, attention.num_heads, -1))
        query, key, _ = projected.permute(2, 0, 3, 1, 4)
        query, key = attention.q_norm(query), attention.k_norm(key)
        return AttentionCall(query, key, kwargs.get("attn_mask"), attention.scale, False)

    @property
    def vision_implementation(self) -> str:
        return "sdpa" if self.encoder.blocks[0].attn.fused_attn else "eager"

    @property
    def masked(self) -> Sequence[nn.Module]:
        return self.vision_attention

    def with_mask(self, mask: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attn_mask": mask}

    @property
    def masks_keys(self) -> bool:
        return True
