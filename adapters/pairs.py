"""Load an image encoder with its text tower by name, and encode pictures and texts with it.

| name | what is loaded |
|---|---|
| `tiny-clip` | the embedded model |
| a folder with `open_clip_config.json`, `hf-hub:...` | a checkpoint of open_clip's |
| a name of open_clip's, such as `ViT-B-32` | that model with `pretrained`, a tag or a file of weights |
| such a name, a colon and a tag, such as `ViT-B-32:openai` | the same |
| a folder with `config.json`, any other name | a CLIP or SigLIP checkpoint of transformers |
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from vtc import adapters, embedded
from vtc.adapters.compat import without_bars
from vtc.errors import InputError, UnsupportedModel, VTCError, one_line
from vtc.method.checkpoint import content_digest, digests

OPEN_CLIP, TRANSFORMERS = "open_clip_config.json", "config.json"
HUB = "hf-hub:"
HINT = (
    "Give tiny-clip, a checkpoint folder, a model of open_clip's with its --pretrained tag or file, or the hub name of "
    "a CLIP or SigLIP"
)


class Encoder(ABC):
    """An image encoder and the text tower trained with it.

    name: as asked for; source: what identifies its weights.

    Raises:
        UnsupportedModel: no adapter knows the class, or it has no text tower.
    """

    def __init__(self, name: str, model: Any, source: dict[str, Any]) -> None:
        found = adapters.encoder_of(model)
        if found is None or not hasattr(model, self.text_call):
            known = ", ".join(each.rpartition(".")[2] for each in adapters.ENCODERS)
            raise UnsupportedModel(
                f"model {name!r} is a {type(model).__name__}, which has no text tower or no adapter; encoders with an "
                f"adapter: {known}, of which CLIP and SigLIP have a text tower"
            )
        self.name, self.model, self.source, self.adapter = name, model.eval(), source, found

    text_call: str
    """The method that encodes texts."""

    @property
    @abstractmethod
    def text_length(self) -> int:
        """Tokens that every text is padded or cut to."""

    @property
    def weight(self) -> Tensor:
        """One of its weights, which tells device and type."""
        weight: Tensor = self.adapter.patch_embedding.weight
        return weight

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the numbers that it produces."""
        dtype = str(self.weight.dtype).removeprefix("torch.")
        return {"class": type(self.model).__name__, **self.source, "dtype": dtype}

    @abstractmethod
    def prepare(self, picture: Image.Image) -> Tensor:
        """Pixels [3, H, W] of a picture, as the checkpoint's own processor makes them."""

    @abstractmethod
    def encode_pictures(self, pixels: Tensor) -> Tensor:
        """Features [B, D] of pixels [B, 3, H, W], as the model returns them."""

    @abstractmethod
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Features [N, D] of texts, as the model returns them."""

    @torch.inference_mode()
    def pictures(self, pixels: Tensor) -> Tensor:
        """Features [B, D] of length 1."""
        return functional.normalize(self.encode_pictures(pixels.to(self.weight)), dim=-1)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        """Features [N, D] of length 1."""
        parts = [self.encode_texts(texts[start : start + batch]) for start in range(0, len(texts), batch)]
        return functional.normalize(torch.cat(parts), dim=-1)

    def patches(self, pixels: Tensor) -> int:
        """How many patches each of these pixels [B, 3, H, W] becomes."""
        rows, columns = (int(step) for step in self.adapter.patch_embedding.stride)
        return (pixels.shape[-2] // rows) * (pixels.shape[-1] // columns)


class OpenClip(Encoder):
    """A model of open_clip's."""

    text_call = "encode_text"

    def __init__(self, name: str, model: Any, source: dict[str, Any], preprocess: Any, tokenizer: Any) -> None:
        super().__init__(name, model, source)
        self._preprocess, self._tokenizer = preprocess, tokenizer

    @property
    def text_length(self) -> int:
        length: int = self._tokenizer.context_length
        return length

    def prepare(self, picture: Image.Image) -> Tensor:
        pixels: Tensor = self._preprocess(picture)
        return pixels

    def encode_pictures(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model.encode_image(pixels)
        return features

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        features: Tensor = self.model.encode_text(self._tokenizer(list(texts)).to(self.weight.device))
        return features


class Transformers(Encoder):
    """A CLIP or SigLIP of transformers."""

    text_call = "get_text_features"

    def __init__(self, name: str, model: Any, source: dict[str, Any], processor: Any) -> None:
        super().__init__(name, model, source)
        self._processor = processor

    @property
    def text_length(self) -> int:
        length: int = self.model.config.get_text_config().max_position_embeddings
        return length

    def prepare(self, picture: Image.Image) -> Tensor:
        pixels: Tensor = self._processor.image_processor(images=[picture], return_tensors="pt")["pixel_values"]
        return pixels[0]

    def encode_pictures(self, pixels: Tensor) -> Tensor:
        return _features(self.model.get_image_features(pixel_values=pixels))

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        words = self._processor.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.text_length, return_tensors="pt"
        )
        return _features(self.model.get_text_features(**words.to(self.weight.device)))


def _features(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return found


def open_pair(name: str, *, pretrained: str | None = None, revision: str | None = None) -> Encoder:
    """Load `name`, see the module's table, on the CPU.

    Raises:
        InputError: nothing can be loaded, or weights are missing.
        UnsupportedModel: no adapter knows the class, or it has no text tower.
    """
    if name in embedded.NAMES:
        raise UnsupportedModel(f"model {name!r} is a multimodal LLM, which `vtc sweep` takes. {HINT}")
    head, colon, tag = name.rpartition(":")
    if pretrained is None and colon and _known_to_open_clip(head):
        name, pretrained = head, tag
    path = str(embedded.model_path(name)) if name in embedded.ENCODERS else name
    folder = Path(path)
    if folder.exists() and not any((folder / file).is_file() for file in (OPEN_CLIP, TRANSFORMERS)):
        raise InputError(f"model {name!r} holds no {OPEN_CLIP} and no {TRANSFORMERS}. {HINT}")
    try:
        with _quiet(), without_bars():
            if (folder / OPEN_CLIP).is_file() or path.startswith(HUB) or _known_to_open_clip(path):
                return _open_clip(name, path, pretrained)
            return _transformers(name, path, pretrained, revision)
    except VTCError:
        raise
    except Exception as error:  # whatever the two libraries raise
        raise InputError(f"cannot load model {name!r}: {one_line(error)}. {HINT}") from error


def _known_to_open_clip(name: str) -> bool:
    try:
        import open_clip
    except ImportError:
        return False
    return name in open_clip.list_models()


def _open_clip(name: str, path: str, pretrained: str | None) -> Encoder:
    try:
        import open_clip  # the extra `clip`
    except ImportError as error:
        raise InputError(
            f"model {name!r} is one of open_clip's, which is missing here; pip install 'visual-token-compression[clip]'"
        ) from error
    known = f"local-dir:{path}" if Path(path).is_dir() else path
    if pretrained is None and known == path and not path.startswith(HUB):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(path)) or "none is known"
        raise InputError(
            f"model {name!r} would have random weights; give --pretrained with a file, or one of its tags, which may "
            f"also stand behind a colon as in {name}:TAG: {tags}"
        )
    if pretrained is not None and known != path:
        raise InputError(f"model {name!r} has its weights beside it; leave --pretrained {pretrained!r} away")
    model, preprocess = open_clip.create_model_from_pretrained(known, pretrained)
    if Path(path).is_dir():
        source: dict[str, Any] = digests(Path(path))
    else:
        weights = Path(pretrained or "")
        source = {"name": path, "weights": content_digest(weights)[:16] if weights.is_file() else pretrained}
    return OpenClip(name, model, source, preprocess, open_clip.get_tokenizer(known))


def _transformers(name: str, path: str, pretrained: str | None, revision: str | None) -> Encoder:
    from transformers import AutoModel, AutoProcessor

    if pretrained is not None:
        raise InputError(f"--pretrained {pretrained!r} goes with a model of open_clip's, which {name!r} is not")
    model = AutoModel.from_pretrained(path, revision=revision)
    commit = getattr(model.config, "_commit_hash", None)
    source: dict[str, Any] = {"commit": commit} if commit else digests(Path(path))
    return Transformers(name, model, source, AutoProcessor.from_pretrained(path, revision=revision))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Neither library comments on what it loads."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
