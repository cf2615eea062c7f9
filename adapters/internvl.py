"""InternVL: tiles of one size and an overview behind them, videos of counted frames, pixel shuffle, no separators."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vtc.adapters.base import Adapter
from vtc.adapters.compat import refuse_other_layer, refuse_wrong_order
from vtc.adapters.frames import FrameText, Run, frame_text, group, listed, numbered, runs
from vtc.adapters.shapes import llm_shape, tower_shape
from vtc.adapters.tiles import Canvas, Tiling, canvas, tilings
from vtc.batch.context import VisionContext
from vtc.cost.shapes import Encoded, ModelShape, ProjectorShape
from vtc.errors import UnsupportedCall
from vtc.method.base import ModelSpec
from vtc.method.layout import Kind, VisualItem
from vtc.ops.hashing import fingerprint, joint_fingerprint

MARKS = 2
"""Ids between two images that no text separates: </img> and <img>."""


class InternVLAdapter(Adapter):
    """InternVLForConditionalGeneration (InternVL3-hf and InternVL3.5-hf).

    model
    ├── vision_tower .encoder.layer[i].attention
    ├── multi_modal_projector, behind pixel_shuffle
    └── language_model .layers[i].self_attn
    lm_head

    The encoder sees tiles. Which of them are one image only the prompt tells: an image is an unbroken run of
    placeholders, as its processor writes it between <img> and </img>; images whose placeholders touch count as one.
    The last tile of an image of several is the overview; rows and columns of the others are unknown to the model, and
    follow from the size of the picture and the settings of the processor where the caller gives both.
    A video reaches the model as one image of one tile per frame, with a counting text between them ("Frame2: "). Its
    frames are one item if the ids of that text are known: from the processor, or from `model.config.video_frame_texts`,
    a list of those before frame 2, 3, ... with the marks around them. Otherwise counted images of one tile are refused,
    since they may be frames.
    """

    family = "internvl"
    model_classes: ClassVar[tuple[str, ...]] = ("InternVLForConditionalGeneration",)
    modalities: ClassVar[tuple[Kind, ...]] = ("image", "video")
    towers: ClassVar[tuple[str, ...]] = ("InternViT",)
    references: ClassVar[tuple[ModelSpec, ...]] = (
        ModelSpec(
            "internvl", 24, 23, True, tuple(range(24)), 28, encoder_stages=True, joins=True
        ),  # InternVL3-8B-hf, InternViT-300M
    )

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        texts = getattr(self.model.config, "video_frame_texts", None)
        self.frame_text: FrameText | None = listed(texts) if texts else None
        self.canvas: Canvas | None = None

    def learn(self, processor: Any) -> None:
        self.frame_text, self.canvas = frame_text(processor), canvas(processor)

    @property
    def vision_layers(self) -> Sequence[nn.Module]:
        return list(self.backbone.vision_tower.encoder.layer)

    @property
    def vision_attention(self) -> Sequence[nn.Module]:
        return [layer.attention for layer in self.vision_layers]  # type: ignore[misc]

    @property
    def projector(self) -> nn.Module:
        return self.backbone.multi_modal_projector  # type: ignore[no-any-return]

    @property
    def spec(self) -> ModelSpec:
        config = self.model.config
        layers = config.vision_config.num_hidden_layers
        index = config.vision_feature_layer
        return ModelSpec(
            family=self.family,
            vision_layers=layers,
            feature_layer=index - 1 if index >= 0 else layers + index,  # hidden_states[0] is the embedding output
            has_cls=True,
            full_attention_layers=tuple(range(layers)),
            llm_layers=config.text_config.num_hidden_layers,
            width=config.text_config.hidden_size,
            vision_width=config.vision_config.hidden_size,
            encoder_stages=index in (-1, layers),  # the output of inner layers is captured before it can be filled up
            joins=True,
        )

    @property
    def masked(self) -> Sequence[nn.Module]:
        return self.vision_attention

    def check_call(self, arguments: dict[str, Any]) -> None:
        refuse_other_layer(arguments, self.model.config.vision_feature_layer)

    @classmethod
    def shape(cls, config: Any) -> ModelShape:
        vision, llm = config.vision_config, llm_shape(config)
        (height, width), (rows, cols) = vision.patch_size, vision.image_size
        tower, patches = tower_shape(vision, patch=height * width, prefix=1), rows // height * (cols // width)
        merged = round(1 / config.downsample_ratio) ** 2
        projector = ProjectorShape(tower.hidden * merged, llm.hidden, llm.hidden, merged, cut=1)
        return ModelShape("", llm, tower, projector, patches, 13 * patches // merged, family=cls.family)

    def encoded(self, inputs: Mapping[str, Any]) -> Encoded:
        pixels = inputs.get("pixel_values")
        if pixels is None:
            return Encoded()
        height, width = self.model.config.vision_config.patch_size
        patches = pixels.shape[-2] // height * (pixels.shape[-1] // width)
        return self.shape(self.model.config).crops(pixels.shape[0], patches)

    def unit(self, kind: Kind) -> int:
        side: int = round(1 / self.model.config.downsample_ratio)
        return side

    def gathering(self, kind: Kind) -> tuple[nn.Module, Literal["before", "behind"]] | None:
        return self.vision_layers[-1], "behind"

    def describe(self, kind: Kind, arguments: dict[str, Any], output: Any) -> VisionContext:
        """One item per tile; `regroup` joins them to images."""
        pixels: Tensor = arguments["pixel_values"]
        config = self.model.config
        strategy = arguments.get("vision_feature_select_strategy") or config.vision_feature_select_strategy
        first = 1 if strategy == "default" else 0
        patch = config.vision_config.patch_size
        rows, cols = pixels.shape[-2] // patch[0], pixels.shape[-1] // patch[1]
        ratio = config.downsample_ratio
        merged = round(1 / ratio) ** 2

        def pack(values: Tensor) -> Tensor:
            """[tiles, T, C] -> [tiles, T / merged, C]: the mean over the patches that pixel shuffle joins."""
            count, _, width = values.shape
            shuffled = self.backbone.pixel_shuffle(values.reshape(count, rows, cols, width), scale_factor=ratio)
            return shuffled.reshape(count, -1, merged, width).mean(2)  # type: ignore[no-any-return]

        place = pack(torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).float()[None])[0]
        item = _item(
            "image",
            1,
            None,
            place.to(pixels.device, non_blocking=True),
            (rows, cols),
            (round(rows * ratio), round(cols * ratio)),
        )
        return VisionContext(
            kind="image",
            items=[item] * len(pixels),
            fingerprint=fingerprint(pixels),
            to_tokens=lambda values: list(pack(values[:, first:])),
        )

    def regroup(
        self,
        contexts: tuple[VisionContext, ...],
        placeholders: Tensor,
        ids: Tensor | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> tuple[VisionContext, ...]:
        """Join tiles to images and frames to videos by the prompt, of which placeholders and few ids go to the host."""
        if not contexts:
            return contexts
        (context,) = contexts
        refuse_wrong_order(context, placeholders[0])
        rows: list[list[bool]] = placeholders[0].tolist()
        placed, encoded = sum(map(sum, rows)), context.total
        if not placed or not encoded or placed % encoded:
            return contexts  # the engine refuses placeholders that do not match what was encoded
        tile, expand = context.items[0].n_tokens, placed // encoded
        images = [runs(row) for row in rows[::expand]]
        lengths = [run.length for row in images for run in row]
        if any(length % tile for length in lengths):
            raise UnsupportedCall(
                f"a run of image placeholders is no multiple of the {tile} tokens of a tile ({lengths}); keep "
                "the prompt as the processor writes it"
            )
        grouped = self._grouped(images, tile, None if ids is None else ids[::expand])
        tiles = iter(length // tile for length in lengths)
        items: list[tuple[Kind, int]] = [
            ("video" if count > 1 else "image", sum(itertools.islice(tiles, count))) for count in grouped
        ]
        pictures = iter(tilings([count for kind, count in items if kind == "image"], sizes, self.canvas))
        return (_join(context, [(*item, next(pictures) if item[0] == "image" else None) for item in items]),)

    def _grouped(self, images: Sequence[Sequence[Run]], tile: int, ids: Tensor | None) -> list[int]:
        """Runs of placeholders of each item, prompt by prompt; UnsupportedCall where images may be frames."""
        neighbours = [(one, two) for row in images for one, two in itertools.pairwise(row)]
        apart = [two.start - one.end for one, two in neighbours if one.length == two.length == tile]
        if not any(places > MARKS for places in apart):  # nothing that could be two frames
            return [1] * sum(map(len, images))
        if ids is None:
            raise UnsupportedCall(
                "images of one tile may be frames of a video, which only the ids between them tell; pass input_ids "
                "instead of inputs_embeds"
            )
        prompts: list[list[int]] = ids.tolist()
        if self.frame_text is not None:
            text = self.frame_text
            rows = zip(prompts, images, strict=True)
            return [count for prompt, row in rows for count in group(prompt, row, tile, text)]
        if any(numbered(prompt, row, tile) for prompt, row in zip(prompts, images, strict=True)):
            raise UnsupportedCall(
                "the prompt counts images of one tile, which are the frames of a video if the processor wrote it; pass "
                "processor=processor to vtc.compress, so that a video is told from images and gets one budget"
            )
        return [1] * sum(map(len, images))


def _join(context: VisionContext, items: Sequence[tuple[Kind, int, Tiling | None]]) -> VisionContext:
    """The context of images and videos that are made of so many consecutive tiles each."""
    tile, counts = context.items[0], [count for _, count, _ in items]
    assert tile.grid is not None
    place = torch.stack([tile.row, tile.col], dim=1)
    layouts = {item: _item(*item, place, tile.crop_grid, tile.grid[1:]) for item in set(items)}

    def join(values: Tensor) -> Tensor:
        """[tiles, N, ...] -> [I, Nmax, ...]"""
        return pad_sequence([part.flatten(0, 1) for part in torch.split(values, list(counts))], batch_first=True)

    alive = context.alive
    if alive is not None:
        starts = [sum(counts[:image]) for image in range(len(counts))]
        kept = tuple(sum(alive[1][start : start + count]) for start, count in zip(starts, counts, strict=True))
        alive = join(alive[0]), kept
    return dataclasses.replace(
        context,
        items=[layouts[item] for item in items],
        fingerprint=joint_fingerprint(context.fingerprint, counts),
        to_tokens=lambda values: [
            part.flatten(0, 1) for part in torch.split(torch.stack(context.to_tokens(values)), list(counts))
        ],
        attention={pair: join(values) for pair, values in context.attention.items()},
        alive=alive,
    )


def _item(
    kind: Kind, tiles: int, tiling: Tiling | None, place: Tensor, crop_grid: tuple[int, int], tokens: tuple[int, int]
) -> VisualItem:
    """Geometry of an image of so many tiles, the last of which is its overview, or of a video of so many frames.

    tiling: rows and columns of the tiles that are no overview, row by row, if known. place: [n, 2] row and column of
    the tokens of one tile. tokens: their rows and columns.
    """
    crop = torch.arange(tiles, device=place.device).repeat_interleave(len(place))
    return VisualItem(
        kind=kind,
        n_tokens=len(crop),
        crop=crop,
        row=place[:, 0].repeat(tiles),
        col=place[:, 1].repeat(tiles),
        newline=torch.zeros_like(crop, dtype=torch.bool),
        n_crops=tiles,
        crop_grid=crop_grid,
        grid=(tiles, *tokens),
        thumbnail=tiles - 1 if tiles > 1 and kind == "image" else None,
        tiling=tiling,
    )
