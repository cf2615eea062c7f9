"""Rows that a method drops in front of the LLM are neither embedded nor copied; those that stay have the same bits."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc import adapters
from vtc.testing import TINY_MODELS, tiny_inputs, tiny_model

LAYOUT: list[list[Any]] = [[4, "image", 3, "image", 5], [2, "image", 12]]
CASES = [(name, kind) for name, tiny in TINY_MODELS.items() for kind in tiny.kinds]


class Seen:
    """What a forward pass embedded, and what entered the first layer and left the backbone."""

    def __init__(self, model: Any, inputs: dict[str, Tensor], manager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.embedded: list[int] = []
        self.rows: Tensor | None = None
        real = torch.nn.functional.embedding

        def counting(ids: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if weight is table:
                self.embedded.append(ids.numel())
            return real(ids, weight, *args, **kwargs)

        table = model.get_input_embeddings().weight
        layer = adapters.of(model).layers[0]
        hook = layer.register_forward_pre_hook(self._keep, with_kwargs=True)
        with manager, torch.no_grad(), monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "embedding", counting)
            self.output = adapters.of(model).backbone(**inputs)
        hook.remove()

    def _keep(self, module: Any, args: Any, kwargs: Any) -> None:
        self.rows = args[0] if args else kwargs["hidden_states"]


def layout(kind: str) -> list[list[Any]]:
    return [[kind if piece == "image" else piece for piece in row] for row in LAYOUT]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_only_rows_that_stay_are_embedded(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(name)
    inputs = tiny_inputs(name, layout(kind), seed=3, model=model)
    plain = Seen(model, inputs, nullcontext(), monkeypatch)
    handle = vtc.compress(model, "stride", retention=0.4)
    short = Seen(model, inputs, handle, monkeypatch)
    assert plain.rows is not None and short.rows is not None
    assert plain.embedded == [inputs["input_ids"].numel()]
    size, length, _ = short.rows.shape
    assert short.embedded == [size * length] and length < plain.rows.shape[1]
    visual = torch.isin(inputs["input_ids"], torch.tensor(list(adapters.of(model).placeholders.values())))
    gone = visual.sum(1) - torch.tensor(handle.stats.calls[-1].visual_tokens_kept)
    held = (inputs["attention_mask"].sum(1) - gone).int().tolist()
    for row in range(size):
        same = (short.rows[row][:, None] == plain.rows[row][None]).all(-1)
        place = -1
        for match in same[length - held[row] :]:
            later = [found for found in match.nonzero().flatten().tolist() if found > place]
            assert later, "a row of other bits, or out of order"
            place = later[0]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_output_shows_the_whole_features(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(name)
    inputs = tiny_inputs(name, layout(kind), seed=3, model=model)
    shown = f"{kind}_hidden_states"
    plain = Seen(model, inputs, nullcontext(), monkeypatch).output
    short = Seen(model, inputs, vtc.compress(model, "stride", retention=0.4), monkeypatch).output
    expected, found = getattr(plain, shown, None), getattr(short, shown, None)
    assert (expected is None) == (found is None)
    if expected is not None:
        assert torch.equal(expected, found)


def test_somebody_who_watches_the_embedding_sees_every_token(clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tiny_inputs("llava-clip", layout("image"), seed=3)
    unwatched = Seen(clip, inputs, vtc.compress(clip, "stride", retention=0.4), monkeypatch)
    seen: list[Tensor] = []
    hook = clip.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output))
    watched = Seen(clip, inputs, vtc.compress(clip, "stride", retention=0.4), monkeypatch)
    hook.remove()
    assert [tuple(rows.shape[:2]) for rows in seen] == [tuple(inputs["input_ids"].shape)]
    assert unwatched.rows is not None and watched.rows is not None
    assert torch.equal(unwatched.rows, watched.rows)


def test_a_prefill_through_encoder_outputs_is_looked_up_too(clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tiny_inputs("llava-clip", layout("image"), seed=3)
    with vtc.compress(clip, "stride", retention=0.4) as handle:
        pixels = inputs.pop("pixel_values")
        given = {"mm_encoder_outputs": {"image": clip.model.get_image_features(pixels)}}
        before = [part.clone() for part in given["mm_encoder_outputs"]["image"].pooler_output]
        found = Seen(clip, {**inputs, **given}, nullcontext(), monkeypatch)
        after = given["mm_encoder_outputs"]["image"].pooler_output
    direct = Seen(clip, {**inputs, "pixel_values": pixels}, vtc.compress(clip, "stride", retention=0.4), monkeypatch)
    assert len(handle.stats.calls) == 1
    assert found.rows is not None and direct.rows is not None
    assert torch.equal(found.rows, direct.rows)
    assert found.embedded == direct.embedded
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))  # the caller's own
