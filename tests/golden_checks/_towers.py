"""Whole models around a vision tower in a case's sizes, with random weights and a projector that changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import _replay as replay
import torch
import transformers
from torch import Tensor, nn

from vtc import adapters
from vtc.method.base import Compressor

IMAGE, VIDEO, TEXT, START = 7, 6, 3, 5
FAMILIES = {
    "llava": ("Llava", "CLIPVision"),
    "llava-next": ("LlavaNext", "CLIPVision"),
    "llava-next-video": ("LlavaNextVideo", "CLIPVision"),
    "llava-onevision": ("LlavaOnevision", "SiglipVision"),
}


@dataclass(frozen=True)
class Tower:
    """A model and the prompt it is run on."""

    model: Any
    inputs: dict[str, Tensor]

    def run(
        self,
        method: Compressor | None = None,
        *,
        attention: Mapping[int, replay.Attention] | None = None,
        projected: Tensor | None = None,
        entering: Mapping[int, Tensor] | None = None,
        **options: Any,
    ) -> replay.Run:
        """As `_replay.run`. attention, entering: by encoder layer. projected: what enters the projector."""
        adapter = adapters.of(self.model)
        rows = {adapter.vision_layers[layer]: each for layer, each in (entering or {}).items()}
        rows |= {} if projected is None else {adapter.projector: projected}
        layers = {adapter.vision_attention[layer]: each for layer, each in (attention or {}).items()}
        return replay.run(self.model, self.inputs, method, attention=layers, entering=rows, **options)


def build(
    family: str, side: int, width: int, *, crops: int = 1, tokens: int = 0, size: tuple[int, int] | None = None,
    patch: int = 1, layers: int = 24, heads: int = 1, llm: int = 1, **more: Any,
) -> Tower:  # fmt: skip
    """A LLaVA of square crops of side x side patches and an LLM of `llm` layers that is `width` wide, in float32.

    crops: images of as many prompts, tiles of one image of `size` (height, width) pixels, or frames of one video; the
    family says which. tokens: of an item in the prompt, where they are not its patches. layers, heads: of the tower,
    whose rows are as wide as the LLM's. more: of the model's configuration.
    """
    whole, tower = FAMILIES[family]
    config = getattr(transformers, f"{tower}Config")(
        hidden_size=width, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=heads,
        image_size=side * patch, patch_size=patch,
    )  # fmt: skip
    text = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=16, num_hidden_layers=llm, num_attention_heads=1, vocab_size=8,
        pad_token_id=None,
    )  # fmt: skip
    config = getattr(transformers, f"{whole}Config")(
        vision_config=config, text_config=text, image_token_index=IMAGE, video_token_index=VIDEO, **more
    )
    model = made(getattr(transformers, f"{whole}ForConditionalGeneration"), config)
    model.model.multi_modal_projector = nn.Identity()
    tokens, video = tokens or side * side, family in ("llava-next-video", "llava-onevision")
    inputs = prompt(tokens, crops if family == "llava" else 1, token=VIDEO if video else IMAGE)
    given = pixels(crops, 3, side * patch, side * patch)
    inputs["pixel_values_videos" if video else "pixel_values"] = given if family == "llava" else given[None]
    if size is not None:
        inputs["image_sizes"] = torch.tensor([size])
    return Tower(model, inputs)


def qwen(layers: int, full: tuple[int, ...], heads: int, grid: Tensor, before: int, after: int) -> Tower:
    """A Qwen2.5-VL with windows of 112 pixels in all encoder layers but `full`, and one image between two texts."""
    vision = {
        "depth": layers, "hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 16, "num_heads": heads,
        "fullatt_block_indexes": list(full), "tokens_per_second": 2,
    }  # fmt: skip
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text | rope | {"num_key_value_heads": 1, "vocab_size": 8}, vision_config=vision,
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=4,
    )  # fmt: skip
    inputs = prompt(int(grid.prod()) // 4, before=before, after=after)
    inputs["input_ids"][0, before - 1] = START
    inputs |= {"mm_token_type_ids": (inputs["input_ids"] == IMAGE).int(), "image_grid_thw": grid}
    inputs["pixel_values"] = pixels(int(grid.prod()), 3 * 2 * 14 * 14)
    return Tower(made(transformers.Qwen2_5_VLForConditionalGeneration, config), inputs)


def prompt(tokens: int, rows: int = 1, *, before: int = 1, after: int = 1, token: int = IMAGE) -> dict[str, Tensor]:
    """Ids of `rows` prompts with one item of so many tokens between two texts."""
    ids = torch.tensor([TEXT] * before + [token] * tokens + [TEXT] * after)
    return {"input_ids": ids.expand(rows, -1).clone()}


def pixels(*shape: int) -> Tensor:
    """Random numbers, the same every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def numbered(crops: int, patches: int, width: int = 2) -> Tensor:
    """[crops, patches, width] rows that begin with their crop and their number in it."""
    rows = torch.cartesian_prod(torch.arange(crops), torch.arange(patches)).float()
    return torch.nn.functional.pad(rows, (0, width - 2)).view(crops, patches, width)


def pass_through(layers: Any) -> None:
    """Let what enters the layers leave them unchanged."""
    for name, module in nn.ModuleList(layers).named_modules():
        if name.endswith(("o_proj", "out_proj", "fc2", "down_proj")):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)


def made(kind: Any, config: Any) -> Any:
    """A random model in float32, the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config).eval().float()
    model.set_attn_implementation("sdpa")
    return model
