"""The small LLaVA: a CLIP tower and a Llama, both 128 wide, built from their configurations with random weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vtc.eval.tiny.heads import content_loss, place_loss, split_content
from vtc.eval.tiny.layout import PREFIX, VISUAL_TOKENS
from vtc.eval.tiny.scenes import GRID, PATCH, SIZE
from vtc.eval.tiny.targets import PATCH_CLASSES, PRESENCE_BITS
from vtc.eval.tiny.vocabulary import BEGIN, END, IMAGE, PAD, TOKEN, USER, VOCABULARY

TRAINING_ATTENTION = "vtc_tiny_plain"


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the two transformers; the defaults are those of the embedded model."""

    hidden: int = 128
    vision_layers: int = 5
    text_layers: int = 6
    heads: int = 4
    vision_inner: int = 512
    text_inner: int = 352


def model_config(shape: ModelShape) -> Any:
    """Configuration of a LLaVA that reads the last but one layer of its tower, as LLaVA-1.5 does."""
    vision = CLIPVisionConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.vision_inner,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.heads,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=shape.hidden,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=shape.hidden,
        intermediate_size=shape.text_inner,
        num_hidden_layers=shape.text_layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=TOKEN[BEGIN],
        eos_token_id=TOKEN[END],
        pad_token_id=TOKEN[PAD],
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=TOKEN[IMAGE],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=VISUAL_TOKENS,
        tie_word_embeddings=False,
    )


def sine_positions(hidden: int, grid: int) -> Tensor:
    """Sines and cosines of row (first half) and column (second half) of every patch, (grid * grid, hidden), rms 1."""
    frequency = 30.0 ** -(torch.arange(hidden // 4) / (hidden // 4))
    angle = torch.arange(grid)[:, None] * frequency
    axis = math.sqrt(2) * torch.cat([angle.sin(), angle.cos()], dim=1)
    rows = axis[:, None].expand(grid, grid, -1)
    columns = axis[None].expand(grid, grid, -1)
    return torch.cat([rows, columns], dim=-1).reshape(grid * grid, hidden)


def build_model(shape: ModelShape, attention: str = "sdpa") -> Any:
    """A LLaVA with fresh weights from torch's global generator.

    The position embedding of CLIP starts so small that the patches drown it and the features forget where they are; a
    two-dimensional sine code of amplitude 1 is added to its patch rows once, here.
    """
    config = model_config(shape)
    config._attn_implementation = attention
    model = LlavaForConditionalGeneration(config)
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id = TOKEN[BEGIN], TOKEN[END]
    generation.pad_token_id = TOKEN[PAD]
    embedding = model.model.vision_tower.embeddings.position_embedding.weight
    with torch.no_grad():
        embedding[1:] += sine_positions(shape.hidden, GRID)
    return model


def _mix(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    scores = torch.matmul(query, key.transpose(-1, -2))
    return torch.matmul((scores if mask is None else scores + mask).softmax(-1), value)


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    prefix: int = 0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as matmul, softmax, matmul: in bf16 on a CPU this is several times faster than the fused kernel.

    Inputs are (batch, heads, tokens, head size). With `prefix` the first queries skip the keys that no row of the mask
    shows them, those behind the prefix.
    """
    query, key = (query * scaling).to(value.dtype), key.to(value.dtype)
    if key.shape[1] != query.shape[1]:  # fewer key heads than query heads
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if prefix == 0 or attention_mask is None:
        mixed = _mix(query, key, value, attention_mask)
    else:
        head = _mix(
            query[:, :, :prefix],
            key[:, :, :prefix],
            value[:, :, :prefix],
            attention_mask[:, :, :prefix, :prefix],
        )
        tail = _mix(query[:, :, prefix:], key, value, attention_mask[:, :, prefix:])
        mixed = torch.cat([head, tail], dim=2)
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register(TRAINING_ATTENTION, plain_attention)


@dataclass(frozen=True)
class Vision:
    """Features of a batch: patches (B, 144, hidden) and CLS (B, hidden) of the tapped layer, CLS of the last layer."""

    patches: Tensor
    tapped_cls: Tensor
    last_cls: Tensor


def see(model: Any, pixels: Tensor) -> Vision:
    """Run the tower on (B, 3, 168, 168) normalised pixels and take what the language model will read."""
    output = model.model.vision_tower(pixels, output_hidden_states=True)
    tapped = output.hidden_states[-2]
    return Vision(tapped[:, 1:], tapped[:, 0], output.pooler_output)


def answer_logits(model: Any, patches: Tensor, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """Logits of the packed text behind the picture, (B, TEXT_TOKENS, vocabulary).

    `patches` (B, 144, hidden) come from the tower, `ids` (B, TEXT_TOKENS) from `packing`, the other two from `layout`.
    """
    visual = model.model.multi_modal_projector(patches)
    embed = model.get_input_embeddings()
    begin = torch.tensor([[TOKEN[BEGIN], TOKEN[USER]]], device=ids.device).expand(len(ids), -1)
    sequence = torch.cat([embed(begin).to(visual.dtype), visual, embed(ids).to(visual.dtype)], dim=1)
    hidden = model.model.language_model(
        inputs_embeds=sequence,
        attention_mask=mask.to(visual.dtype).expand(len(ids), -1, -1, -1),
        position_ids=positions.expand(len(ids), -1),
        use_cache=False,
        prefix=PREFIX,
    ).last_hidden_state
    logits: Tensor = model.lm_head(hidden[:, PREFIX:])
    return logits


class AuxiliaryHeads(nn.Module):
    """Linear read-outs that exist in training only.

    They ask every patch for its content and its row and column, and the CLS token, in the tapped and in the last
    layer, for what the scene holds. The second makes the attention of CLS point at things, as in a pretrained CLIP.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.content = nn.Linear(hidden, sum(PATCH_CLASSES.values()))
        self.place = nn.Linear(hidden, 2 * GRID)
        self.tapped_presence = nn.Linear(hidden, PRESENCE_BITS)
        self.last_presence = nn.Linear(hidden, PRESENCE_BITS)

    def forward(self, vision: Vision, targets: Tensor, present: Tensor) -> dict[str, Tensor]:
        """Losses "content", "place" and "presence" for `targets` (B, 5, 144) and `present` (B, 64)."""
        return {
            "content": content_loss(self.content_logits(vision.patches), targets),
            "place": place_loss(self.place(vision.patches), targets, GRID),
            "presence": self._presence_loss(vision, present),
        }

    def content_logits(self, patches: Tensor) -> tuple[Tensor, ...]:
        """One (B, 144, classes) tensor per entry of `PATCH_CLASSES`."""
        return split_content(self.content(patches))

    def _presence_loss(self, vision: Vision, present: Tensor) -> Tensor:
        target = present.float()
        last = F.binary_cross_entropy_with_logits(self.last_presence(vision.last_cls).float(), target)
        tapped = F.binary_cross_entropy_with_logits(self.tapped_presence(vision.tapped_cls).float(), target)
        return 5 * (last + tapped)
