"""`tiny-clip`: a model of open_clip's own classes with a word-level tokenizer, and the folder that open_clip loads."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vtc.app.loading import load
from vtc.errors import InputError
from vtc.eval.tiny.batches import PIXEL_MEAN, PIXEL_STD
from vtc.eval.tiny.captions import MAX_WORDS
from vtc.eval.tiny.family import Recorder
from vtc.eval.tiny.processor import build_tokenizer
from vtc.eval.tiny.scenes import PATCH, SIZE
from vtc.eval.tiny.vocabulary import END, EXTENDED, PAD, TOKEN

WEIGHTS, CONFIGURATION = "open_clip_model.safetensors", "open_clip_config.json"
"""The names under which open_clip looks for them in a folder."""
CONTEXT = MAX_WORDS + 2
SIZES = {"width": 128, "vision_layers": 6, "text_layers": 2}
HEAD = 32
GROUPS = 4  # of texts of like length


def configuration(width: int, vision_layers: int, text_layers: int) -> dict[str, Any]:
    """The content of `open_clip_config.json`; there are 144 patches and a class token, which is pooled."""
    vision = {
        "image_size": SIZE, "patch_size": PATCH, "layers": vision_layers, "width": width, "head_width": HEAD,
    }  # fmt: skip
    text = {
        "context_length": CONTEXT, "vocab_size": len(EXTENDED), "width": width, "heads": width // HEAD,
        "layers": text_layers, "pool_type": "eos", "eos_id": TOKEN[END], "pad_id": TOKEN[PAD],
        "hf_tokenizer_name": "tiny-clip",
    }  # fmt: skip
    pixels = {"mean": list(PIXEL_MEAN), "std": list(PIXEL_STD), "interpolation": "bicubic", "resize_mode": "shortest"}
    return {"model_cfg": {"embed_dim": width, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": pixels}


def build(sizes: Mapping[str, int] = SIZES) -> Any:
    """An `open_clip.model.CLIP` with fresh weights from torch's global generator.

    Raises:
        InputError: open_clip is not installed.
    """
    try:
        from open_clip.model import CLIP  # the extra `clip`
    except ImportError as error:
        raise InputError(
            "tiny-clip is made with open_clip, which is missing here; pip install 'visual-token-compression[clip]'"
        ) from error
    return CLIP(**configuration(**sizes)["model_cfg"])


def tokenizer() -> Any:
    """Words to numbers with `<s>` in front and `</s>` behind, padded on the right, as open_clip calls it."""
    return build_tokenizer(EXTENDED, end=END, padding_side="right")


def tokens(texts: list[str], words: Any) -> Tensor:
    """Token numbers of texts, (B, CONTEXT), by a `tokenizer`."""
    encoded = words(texts, return_tensors="pt", padding="max_length", truncation=True, max_length=CONTEXT)
    ids: Tensor = encoded.input_ids
    return ids


def before_block(name: str, block: int) -> bool:
    """Whether a tensor of the image tower takes part in what enters a block."""
    if name.startswith("transformer.resblocks."):
        return int(name.split(".")[2]) < block
    return not name.startswith(("ln_post", "proj"))


def to_block(visual: Any, pixels: Tensor, block: int) -> Tensor:
    """What enters a block of the image tower, [B, 145, width]."""
    with Recorder(visual.transformer.resblocks[block]) as seen:
        visual(pixels)
    hidden: Tensor = seen.value
    return hidden


def from_block(visual: Any, hidden: Tensor, block: int) -> Tensor:
    """What the image tower makes of `to_block`, [B, width]; the same calculation as the whole."""
    for each in visual.transformer.resblocks[block:]:
        hidden = each(hidden)
    pooled: Tensor = visual.ln_post(hidden[:, 0]) @ visual.proj
    return pooled


def encode_texts(model: Any, ids: Tensor) -> Tensor:
    """`encode_text` for texts (N, CONTEXT) of which most are short: in groups of like length, without the padding.

    Padding stands behind the end, which sees nothing of it.
    """
    lengths = (ids == TOKEN[END]).int().argmax(1) + 1
    order = lengths.argsort()
    features = []
    for group in order.chunk(GROUPS):
        longest = int(lengths[group[-1]])
        hidden = model.token_embedding(ids[group, :longest]) + model.positional_embedding[:longest]
        hidden = model.ln_final(model.transformer(hidden, attn_mask=model.attn_mask[:longest, :longest]))
        features.append(hidden[torch.arange(len(group)), lengths[group] - 1] @ model.text_projection)
    return torch.cat(features)[order.argsort()]


def take_over_tower(model: Any, start: str) -> list[str]:
    """Load the vision tower of the embedded LLaVA `start`, or of a folder, into the blocks of `model`.

    Blocks beyond those that it has begin as the identity. Returns the names of the tensors taken.

    Raises:
        InputError: nothing can be loaded, or its tower is no CLIP of that width and patch size, or has more layers.
    """
    tower = load(start, device="cpu", dtype="float32").model.model.vision_tower
    found = _as_open_clip(tower.state_dict())
    own = model.visual.state_dict()
    misfit = [name for name, tensor in found.items() if name not in own or own[name].shape != tensor.shape]
    if misfit or "conv1.weight" not in found:
        raise InputError(
            f"the tower of {start!r} does not fit tiny-clip ({misfit[0] if misfit else 'it is no CLIP tower'}); start "
            "from tiny-llava"
        )
    model.visual.load_state_dict(found, strict=False)
    with torch.no_grad():
        for block in model.visual.transformer.resblocks[len(tower.encoder.layers) :]:
            for last in (block.attn.out_proj, block.mlp.c_proj):
                last.weight.zero_()
                last.bias.zero_()
    return list(found)


_RENAMED = (
    ("embeddings.class_embedding", "class_embedding"),
    ("embeddings.patch_embedding", "conv1"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("pre_layrnorm", "ln_pre"),
    ("post_layernorm", "ln_post"),
    ("encoder.layers", "transformer.resblocks"),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("self_attn", "attn"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
)


def _as_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a CLIP tower of transformers under open_clip's names, queries, keys and values as one matrix."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if "position_ids" in name or ".k_proj" in name or ".v_proj" in name:
            continue
        if ".q_proj" in name:
            tensor = torch.cat([state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
        renamed = name.removeprefix("vision_model.")
        for theirs, ours in _RENAMED:
            renamed = renamed.replace(theirs, ours)
        found[renamed.replace(".q_proj.", ".in_proj_")] = tensor
    return found


def export(model: Any, sizes: Mapping[str, int], folder: Path) -> None:
    """Write weights in fp16, configuration and tokenizer; `open_clip.create_model("local-dir:FOLDER")` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    half = copy.deepcopy(model).cpu().half()
    save_file({name: tensor.contiguous() for name, tensor in half.state_dict().items()}, folder / WEIGHTS)
    (folder / CONFIGURATION).write_text(json.dumps(configuration(**sizes), indent=2) + "\n")
    tokenizer().save_pretrained(folder)
