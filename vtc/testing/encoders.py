"""Tiny vision encoders without an LLM, and their blocks taken apart, so that methods inside them can be done by hand.

Weights are random and large enough for attention to be uneven.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SIDE, PATCH, BLOCKS = 4, 8, 3
PATCHES = SIDE**2
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": BLOCKS, "num_attention_heads": 4,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 60,
    "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
OPEN: dict[str, Any] = {"layers": BLOCKS, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32}
TIMM: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": BLOCKS, "num_heads": 4, "mlp_ratio": 2,
    "num_classes": 16,
}  # fmt: skip
OPEN_TEXT: dict[str, Any] = {"context_length": 8, "vocab_size": 60, "width": 32, "heads": 4, "layers": 1}


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny encoder with random weights, large enough ones for attention to be uneven."""
    import transformers as t

    torch.manual_seed(3)
    if "timm" in name:
        model: Any = _timm(name)
    elif name.startswith("open_clip"):
        open_clip: Any = importlib.import_module("open_clip")  # an extra
        kind = open_clip.model.CustomTextCLIP if "custom" in name else open_clip.model.CLIP
        more = {"pool_type": "avg"} if "avg" in name else {"attentional_pool": True} if "pool" in name else {}
        model = kind(embed_dim=16, vision_cfg={**OPEN, "attn_pooler_heads": 4, **more}, text_cfg=OPEN_TEXT)
    elif name == "CLIPModel":
        model = t.CLIPModel(t.CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=16))
    elif name == "SiglipModel":
        model = t.SiglipModel(t.SiglipConfig(vision_config=VISION, text_config=TEXT))
    else:
        config = getattr(t, f"{name.removesuffix('Model').removesuffix('ModelWithProjection')}Config")
        model = getattr(t, name)(config(**VISION))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.2)
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.add_(1)
    return model.to(dtype).eval()


def _timm(name: str) -> Any:
    """An open_clip model whose image tower is a tiny VisionTransformer of timm."""
    open_clip: Any = importlib.import_module("open_clip")  # an extra, as is timm
    transformer: Any = importlib.import_module("timm").models.VisionTransformer
    tower = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": ""}
    model = open_clip.model.CustomTextCLIP(embed_dim=16, vision_cfg=tower, text_cfg=OPEN_TEXT)
    more: dict[str, Any] = {"global_pool": "avg"}
    if "map" in name:
        more = {"global_pool": "map", "class_token": False}
    elif "registers" in name:
        more = {"reg_tokens": 2, "init_values": 0.1, "pre_norm": True}
    model.visual.trunk = transformer(**TIMM, **more)
    return model


NAMES = [
    "CLIPModel", "CLIPVisionModel", "CLIPVisionModelWithProjection", "SiglipModel", "SiglipVisionModel", "Dinov2Model",
    "Dinov2WithRegistersModel", "ViTModel", "open_clip", "open_clip custom avg", "timm map", "timm registers",
    "timm avg",
]  # fmt: skip
POOLED = [name for name in NAMES if "Siglip" in name or "avg" in name]
PREFIX = {
    **dict.fromkeys(NAMES, 1), "SiglipModel": 0, "SiglipVisionModel": 0, "timm map": 0,
    "timm registers": 3, "Dinov2WithRegistersModel": 5,
}  # fmt: skip


def pixels(batch: int = 3, seed: int = 0) -> Tensor:
    """[B, 3, 32, 32] random pictures."""
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def drawn(seed: int, batch: int = 2, side: int = PATCH, colours: int = 2) -> Tensor:
    """[B, 3, 4 * side, 4 * side] pictures of 4 x 4 squares in few colours, the first of them with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randint(0, colours, (batch, 1, SIDE, SIDE), generator=generator).float().expand(-1, 3, -1, -1)
    picture = cells.repeat_interleave(side, 2).repeat_interleave(side, 3)
    noise = 0.1 * torch.rand(picture.shape, generator=generator)
    return torch.cat([picture[:1] + noise[:1], picture[1:]])


def encode(model: Any, images: Tensor) -> Tensor:
    """[B, D] the pooled output, by the call a user would write."""
    for name in ("encode_image", "get_image_features"):
        if hasattr(model, name):
            output = getattr(model, name)(images)
            break
    else:
        output = model(pixel_values=images)
    pooled: Any = output if isinstance(output, Tensor) else getattr(output, "image_embeds", None)
    found: Tensor = output.pooler_output if pooled is None else pooled
    return found


def tower(model: Any) -> Any:
    """The module that runs the blocks."""
    one = getattr(model, "visual", getattr(model, "vision_model", model))
    return getattr(one, "trunk", one)


@dataclass
class Block:
    """One block taken apart: x = x + after(attention(before(x))), x = x + second(x)."""

    before: Callable[[Tensor], Tensor]
    qkv: tuple[tuple[Tensor, Tensor], ...]
    after: Callable[[Tensor], Tensor]
    second: Callable[[Tensor], Tensor]


def blocks(model: Any) -> list[Block]:
    """All of them in order."""
    one, found = tower(model), list[Block]()
    if hasattr(one, "transformer"):
        for b in one.transformer.resblocks:
            weights = zip(b.attn.in_proj_weight.chunk(3), b.attn.in_proj_bias.chunk(3), strict=True)
            found.append(Block(b.ln_1, tuple(weights), b.attn.out_proj, _then(b.ln_2, b.mlp)))
        return found
    if hasattr(one, "blocks"):
        for b in one.blocks:
            weights = zip(b.attn.qkv.weight.chunk(3), b.attn.qkv.bias.chunk(3), strict=True)
            found.append(Block(b.norm1, tuple(weights), _then(b.attn.proj, b.ls1), _then(b.norm2, b.mlp, b.ls2)))
        return found
    encoder = getattr(one, "encoder", one)
    for b in encoder.layer if hasattr(encoder, "layer") else encoder.layers:
        a = getattr(b, "self_attn", None) or b.attention
        qkv = tuple((p.weight, p.bias) for p in (a.q_proj, a.k_proj, a.v_proj))
        if hasattr(b, "layer_norm1"):
            found.append(Block(b.layer_norm1, qkv, a.out_proj, _then(b.layer_norm2, b.mlp)))
        elif hasattr(b, "norm1"):
            second = _then(b.norm2, b.mlp, b.layer_scale2)
            found.append(Block(b.norm1, qkv, _then(a.o_proj, b.layer_scale1), second))
        else:
            found.append(Block(b.layernorm_before, qkv, a.o_proj, _then(b.layernorm_after, b.mlp)))
    return found


def _then(*steps: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        for step in steps:
            x = step(x)
        return x

    return run


def embed(model: Any, image: Tensor) -> Tensor:
    """[T, D] what enters the first block."""
    one = tower(model)
    rows: Tensor
    if hasattr(one, "_embeds"):
        rows = one._embeds(image[None])
    elif hasattr(one, "blocks"):
        rows = one.norm_pre(one._pos_embed(one.patch_embed(image[None])))
    else:
        rows = one.embeddings(image[None])
        rows = one.pre_layrnorm(rows) if hasattr(one, "pre_layrnorm") else rows
    return rows[0]


def pool(model: Any, rows: Tensor) -> Tensor:
    """[D] from the rows [T, D] that leave the last block."""
    one = tower(model)
    pooled: Tensor
    if hasattr(one, "proj"):
        rows = one.ln_post(rows)
        pooled = (rows[0] if one.pool_type == "tok" else rows[1:].mean(0)) @ one.proj
    elif hasattr(one, "blocks"):
        pooled = one.forward_head(one.norm(rows)[None])[0]
    elif hasattr(one, "head"):
        pooled = one.head(one.post_layernorm(rows)[None])[0]
    elif hasattr(one, "post_layernorm"):
        first = one.post_layernorm(rows[0])
        pooled = model.visual_projection(first) if hasattr(model, "visual_projection") else first
    else:
        rows = one.layernorm(rows)
        pooled = one.pooler(rows[None])[0] if getattr(one, "pooler", None) is not None else rows[0]
    return pooled


@dataclass
class Seen:
    """What a block computed: queries and keys [T, heads, width], attention [heads, T, T], rows that leave it [T, D]."""

    query: Tensor
    key: Tensor
    attention: Tensor
    rows: Tensor


def importance(seen: Seen, lead: int) -> list[float]:
    """What each patch gets from the class token, without one from all tokens, mean over heads.

    lead: how many class and register tokens stand in front of the patches.
    """
    weights = seen.attention.mean(0)
    scores: list[float] = (weights[0] if lead else weights.mean(0))[lead:].tolist()
    return scores


def one_block(block: Block, x: Tensor, sizes: Tensor | None = None) -> Seen:
    """A block on rows [T, D] of one image, head by head; sizes: [T], how often a key counts."""
    q, k, v = ((block.before(x) @ weight.T + bias).view(len(x), 4, 8) for weight, bias in block.qkv)
    bias = torch.zeros(len(x)) if sizes is None else sizes.log()
    weights = torch.stack([(q[:, head] @ k[:, head].T / math.sqrt(8) + bias).softmax(-1) for head in range(4)])
    x = x + block.after(torch.cat([weights[head] @ v[:, head] for head in range(4)], dim=-1))
    return Seen(q, k, weights, x + block.second(x))


Act = Callable[[int, Tensor, "Seen | None"], "tuple[Tensor, Tensor | None]"]
"""(layer, rows [T, D] about to enter it, what the block before saw) -> the rows that do enter it and their sizes."""


def by_hand(model: Any, image: Tensor, act: Act) -> tuple[Tensor, Tensor]:
    """Pooled output [D] and last rows [T, D] of one image, `act` being asked before every block and behind the last."""
    rows, seen = embed(model, image), None
    for layer, block in enumerate(blocks(model)):
        rows, sizes = act(layer, rows, seen)
        seen = one_block(block, rows, sizes)
        rows = seen.rows
    rows, _ = act(BLOCKS, rows, seen)
    return pool(model, rows), rows
