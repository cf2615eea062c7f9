"""A CLIP pair beside a model: the text half of the CLIP whose vision half the model's encoder is.

The text of the question is what the caller says, or what the tokenizer makes of the prompt's own text. Rows of the
model's encoder go through the last norm and the projection of the pair's vision tower, whose layers never run.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from torch import Tensor

from vtc.adapters.base import Adapter
from vtc.adapters.pairs import Encoder, open_pair
from vtc.adapters.placement import device_of
from vtc.cost.shapes import PairShape
from vtc.engine.llm_pass import LLMPass
from vtc.errors import UnsupportedCall, UnsupportedMethod, VTCError
from vtc.method.pairs import PairFeatures, pair_digests
from vtc.method.readings import exact
from vtc.ops.host import put

ALIKE = 0.9
"""Cosine of two patch embeddings of one origin: one that was trained on hardly moves, others are near zero."""

_ENCODING = threading.Lock()  # tokenizers are no good in two threads at once


class Pair:
    """One pair of one method on one model. shape: its sizes.

    method: name of the method that asks. processor: the model's, None where nobody gave one. Raises VTCError where no
    pair is named, InputError where none can be loaded, and UnsupportedMethod for one that does not fit the model.
    """

    def __init__(self, name: str | None, method: str, adapter: Adapter, processor: Any = None) -> None:
        if name is None:
            raise VTCError(
                f"{method!r} compares patches with the question by the CLIP whose vision tower this model has, and "
                "pair does not name it; write its folder, its hub name, or a name and tag of open_clip's, such as "
                "pair='ViT-L-14-336:openai'"
            )
        self.name, self._tokenizer = name, getattr(processor, "tokenizer", processor)
        self._encoder = _loaded(name, tuple(pair_digests(name).items()), device_of(adapter.language_model))
        self.shape = self._fitting(adapter)

    def _fitting(self, adapter: Adapter) -> PairShape:
        """The sizes, once it is clear that the vision tower is that of the model."""
        pair, own = self._encoder.adapter, adapter.patch_projection
        theirs, layers = pair.patch_embedding.weight, list(pair.text_layers)
        here, there = len(adapter.vision_layers), len(pair.vision_layers)
        if own is None or own.weight.shape != theirs.shape or here > there:
            found = "no patches of that kind" if own is None else f"{here} on {tuple(own.weight.shape)}"
            raise UnsupportedMethod(
                f"pair={self.name!r} has a vision tower of {there} layers on patch embeddings {tuple(theirs.shape)}, "
                f"the encoder of this {adapter.family} model {found}; give the CLIP from which it was taken"
            )
        if not own.weight.is_meta:  # accelerate brings the weights when they are needed
            same = torch.cosine_similarity(own.weight.detach().float().flatten().to(theirs.device), theirs.flatten(), 0)
            if same < ALIKE:
                raise UnsupportedMethod(
                    f"pair={self.name!r} has a vision tower of the sizes of this {adapter.family} model's with other "
                    f"weights (cosine {float(same):.2f} of the patch embeddings); give the CLIP from which it was taken"
                )
        projected = pair.project(torch.zeros(1, theirs.shape[0], device=theirs.device))
        width = next(weight for weight in layers[0].parameters() if weight.ndim == 1).numel()
        return PairShape(
            layers=len(layers),
            hidden=width,
            per_row=sum(weight.numel() for weight in layers[0].parameters() if weight.ndim == 2),
            length=self._encoder.text_length,
            inputs=theirs.shape[0],
            outputs=projected.shape[-1],
            weights=sum(weight.numel() for weight in pair.model.parameters()),
        )

    def features(self, one: LLMPass, device: torch.device) -> PairFeatures:
        """Of the call's questions, on `device`. Encodes them once in each call; synchronises where ids are decoded."""
        if self.name not in one.texts:
            asked = self._asked(one)
            distinct = {text: place for place, text in enumerate(dict.fromkeys(asked))}
            with torch.no_grad(), exact(self._encoder.weight.device), _ENCODING:
                encoded = self._encoder.encode_texts(list(distinct))
            one.texts[self.name] = encoded[put([distinct[text] for text in asked], encoded.device)].to(device)
        return PairFeatures(one.texts[self.name], self._project)

    def _asked(self, one: LLMPass) -> list[str]:
        """The question of every row of a batch."""
        batch, said = one.now, one.questions
        if said is not None:
            if batch.size % len(said):
                raise UnsupportedCall(
                    f"questions has {len(said)} entries for a batch of {batch.size} rows; give one text for all rows, "
                    "or one for each prompt"
                )
            return [text for text in said for _ in range(batch.size // len(said))]
        if self._tokenizer is None or one.ids is None:
            missing = "no processor was given" if self._tokenizer is None else "the prompt came as embeddings"
            raise UnsupportedCall(
                f"pair={self.name!r} encodes the question, whose text is not known: no questions were given and "
                f"{missing}; pass the checkpoint's processor to vtc.compress, or set handle.questions to the text of "
                "each prompt before the call"
            )
        rows = batch.rows
        assert rows.text is not None
        source = rows.source.to(one.ids.device)
        ids, text = one.ids.gather(1, source).tolist(), (rows.text & rows.held).tolist()
        words = [[token for token, real in zip(*row, strict=True) if real] for row in zip(ids, text, strict=True)]
        return [each.strip() for each in self._tokenizer.batch_decode(words, skip_special_tokens=True)]

    @torch.no_grad()
    def _project(self, rows: Tensor) -> Tensor:
        with exact(rows.device):
            projected: Tensor = self._encoder.adapter.project(rows.to(self._encoder.weight))
        return projected.to(rows.device)


@functools.lru_cache(2)  # a sweep attaches its methods batch after batch
def _loaded(name: str, state: tuple[tuple[str, str], ...], device: torch.device) -> Encoder:
    """The pair in float32 on `device`, without the layers of its vision tower."""
    with torch.inference_mode(False):
        encoder = open_pair(name)
        for layer in encoder.adapter.vision_layers:
            for weight in layer.parameters():
                weight.data = weight.new_empty(0)
        encoder.model.to(device, torch.float32).requires_grad_(False)
    return encoder
