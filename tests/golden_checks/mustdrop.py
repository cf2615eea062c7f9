"""MustDrop: window merging and key set, the dual-attention filter, its chain over four layers and cache, a whole LLM.

Case 1 runs on a LLaVA whose encoder layers hand on what enters them. Cases 2 and 3 run on an LLM in which the text pays
what the case stores: the columns of tokens that are gone are left out of an attention that is not scaled again, so the
first row of the system prompt takes the rest. A stored key set stands in the place of the method's own, which case 1
checks. Positions are those that the LLM's rotary embedding is asked for. What case 4 stores of the released decoding,
which numbers tokens by the shorter cache, is not compared: nothing here decodes so.

The average that case 3 stores is at fault: it counts a pruning layer as pruned although the layer still sees all that
enters it, and it is divided by the number of tiles. The tokens that enter the layers are (3 n0 + 4 n1 + 4 n2 + 4 n3 +
17 n4) / 32 of the whole image, however many tiles it has (two in the replayed model); they are recomputed from what the
case stores as entering each pruning layer, and compared with `CallStats.visual_tokens_kept`. So is the count per layer.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import _llm as llm
import _replay as replay
import _towers as towers
import torch
from _replay import Attention, Outputs
from torch import Tensor

import vtc
from vtc import adapters
from vtc.method.base import CacheStage, EncoderStage
from vtc.method.groups import Parts
from vtc.methods.mustdrop import method as code

ENCODER = {"window": "window", "threshold": "tau", "key_rate": "key_rate"}
FILTER = {"pruning_layers": "layers", "global_thr": "gamma", "individual_thr": "alpha"}


# --- step 1
def encoder(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    settings, hidden, attention = replay.settings(case), tensors["input.hidden_l0"], tensors["input.cls_attn"]
    count, side = hidden.shape[1] - 1, settings["grid"][0]
    tower = towers.build("llava", side, hidden.shape[2], heads=settings["heads"], llm=3)
    towers.pass_through(adapters.of(tower.model).vision_layers)
    # Thresholds that nothing meets leave the key set.
    given = {**replay.options(case, ENCODER), "filter": "threshold", "gamma": 2.0, "alpha": 2.0}
    run = tower.run(
        vtc.create("mustdrop", layers=(1,), depth=None, **given), entering={1: hidden},
        attention={23: replay.class_row(replay.logits(attention))},
    )  # fmt: skip
    score = torch.nn.functional.pad(attention.mean(1)[0, 1:], (0, count))
    key = run.at(2)[1].keep[0].nonzero().flatten()
    _, merged = run.at(EncoderStage(1))
    sources = merged.merged_into[0] == merged.keep[0].nonzero()  # [M, N] which raw tokens are in which row
    raw = torch.arange(count).expand_as(sources)
    outputs = {
        "output.size": sources.sum(1),
        "output.first_member": torch.where(sources, raw, count).amin(1),
        "output.last_member": torch.where(sources, raw, -1).amax(1),
        "output.key_idx": key[score[key].argsort(descending=True)],
    }
    exact: Outputs = {name: (value[None], 0.0, 0.0) for name, value in outputs.items()}
    return exact | {"output.features": (run.inputs[0][:, 1:-1], 1e-5, 1e-5)}


# --- step 2
def text_pays(weights: Tensor, start: int) -> Callable[[Tensor], Attention]:
    """A layer whose last T rows pay `weights` [H, T, N] to the image's tokens, of which some may be gone.

    start: number of the first token of the image. The first row of the prompt gets what is left of the attention.
    """

    def attention(rows: Tensor) -> Attention:
        heads, asking, image = weights.shape
        number = llm.numbers(rows[0])
        there = (number >= start) & (number < start + image)
        paid = weights[..., number[there] - start].double()
        whole = torch.zeros(heads, asking, len(number), dtype=torch.float64)
        whole[..., there] = paid
        whole[..., 0] = 1 - paid.sum(-1)
        key = whole.clamp(min=1e-30).log().float().transpose(1, 2)  # rows sum to one as they are
        query = torch.eye(asking).expand(heads, -1, -1)
        return Attention(torch.nn.functional.pad(query, (0, 0, len(number) - asking, 0))[None], key[None])

    return attention


def prompt_of(settings: dict[str, Any]) -> dict[str, Any]:
    length = settings["n_system_tokens"] + settings["n_visual"] + settings["n_text"]
    return {"embeds": llm.numbered(length), "start": settings["n_system_tokens"], "image": settings["n_visual"]}


def filters(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    settings, outputs = replay.settings(case), Outputs()
    prompt, off = prompt_of(settings), {"merge": "off", "cache": False, "key_rate": 0.0}
    model = llm.bare(image=settings["n_visual"], layers=3, heads=settings["heads"])
    pays = text_pays(tensors["input.text_to_vision_attn"], prompt["start"])
    for name, (gamma, alpha) in settings["pairs"].items():
        given = {"filter": "threshold", "layers": (1,), "depth": None, "gamma": gamma, "alpha": alpha}
        run = llm.run(model, method=vtc.create("mustdrop", **off, **given), attention={1: pays}, **prompt)
        outputs[f"output.kept_{name}"] = (run.kept[2], 0.0, 0.0)
    return outputs


# --- steps 2 and 3
def dropped(model: Any, case: dict[str, Any], keys: Tensor, **prompt: Any) -> replay.Run:
    """A run of the published filter and cache, with the case's thresholds and key set."""
    given = vtc.create("mustdrop", merge="off", filter="threshold", **replay.options(case, FILTER))

    def stored(score: Tensor, tiles: Parts, rate: float) -> Tensor:
        return tiles.items & torch.isin(torch.arange(score.shape[1]), keys)

    with replay.watched(code, "key_tokens", stored):
        return llm.run(model, method=given, **prompt)


def starts(layers: list[int]) -> list[int]:
    """First layers of the groups in which all layers hold the same rows."""
    return [0, layers[0], *(layer + 1 for layer in layers)]


def chain(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    settings, weights = replay.settings(case), tensors["input.text_to_vision_attn"]
    layers, prompt = settings["pruning_layers"], prompt_of(settings)
    model = llm.bare(image=prompt["image"], layers=settings["num_layers"], heads=settings["heads"])
    start, end = prompt["start"], prompt["start"] + prompt["image"]
    pays = {layer: text_pays(rows, start) for layer, rows in zip(layers, weights, strict=True)}
    with replay.watched(code, "dual_filter") as alone:
        run = dropped(model, case, tensors["input.key_idx"], attention=pays, **prompt)
    rows = [llm.numbers(each) for each in run.inputs]
    image = [each[(each >= start) & (each < end)] - start for each in rows]
    final = run.alive[CacheStage(layers[0])]
    cached = [each if layer < layers[0] else final for layer, each in enumerate(rows)]
    assert [len(each) for each in cached] == run.lengths
    asked = [run.positions[0][bisect_right(starts(layers), layer) - 1][0] for layer in range(len(rows))]
    keys = [at[torch.isin(row, some)] for at, row, some in zip(asked, rows, cached, strict=True)]
    (average,) = run.handle.stats.calls[0].visual_tokens_kept

    def table(lists: list[Tensor], width: int) -> tuple[Tensor, float, float]:
        return (
            torch.stack([torch.nn.functional.pad(each, (0, width - len(each)), value=-1) for each in lists]),
            0.0,
            0.0,
        )

    length, visual = prompt["embeds"].shape[1], prompt["image"]
    return {
        "output.visual_before": table([image[layer] for layer in layers], visual),
        "output.visual_after": table([run.kept[layer + 1] for layer in layers], visual),
        "output.filter_keeps": table([each[0].nonzero().flatten() for each in alone], visual),
        "output.final_sequence": (rows[-1], 0.0, 0.0),
        "output.cache_token": table(cached, length),
        "output.cache_position": table(keys, length),
        "output.visual_count_per_layer": (torch.tensor([len(each) for each in image]), 0.0, 0.0),
        "output.average_tokens": (torch.tensor([average]), 1e-6, 0.0),
    }


def processed(case: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tokens that enter every layer, and their mean."""
    settings = replay.settings(case)
    ends = [-1, *settings["pruning_layers"], settings["num_layers"] - 1]
    counts = [*(tensors["output.visual_before"] >= 0).sum(1), (tensors["output.visual_after"][-1] >= 0).sum()]
    layers = torch.cat([n.repeat(end - at) for n, (at, end) in zip(counts, pairwise(ends), strict=True)])
    return {"output.visual_count_per_layer": layers, "output.average_tokens": layers.double().mean()[None]}


# --- a whole LLM
def whole(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    settings, near = replay.settings(case), case["tolerance"]["hidden"]
    model = llm.build(settings["config"], llm.weights(tensors, "param."), image=settings["n_visual"])
    prompt = {"embeds": tensors["input.inputs_embeds"], "decode": tensors["input.decode_embeds"]}
    prompt |= {"start": settings["n_system_tokens"], "image": settings["n_visual"]}
    first = starts(settings["pruning_layers"])
    ours = dropped(model, case, tensors["input.key_idx"], **prompt)
    groups = [bisect_right(first, layer) - 1 for layer in range(len(ours.inputs))]

    asked = torch.tensor([[int(call[group]) for group in groups] for call in ours.positions[1:]])
    return {
        "output.last_hidden_state": (ours.states[0], near, near),
        "output.prefill_length": (torch.tensor([len(each) for each in ours.inputs]), 0.0, 0.0),
        "output.cache_length": (torch.tensor(ours.lengths), 0.0, 0.0),
        **{f"output.key_cache_{layer}": (ours.keys[layer], near, near) for layer in (1, 2, 8, 31)},
        "output.decode_corrected": (torch.cat(ours.states[1:]), near, near),
        "output.decode_corrected_positions": (asked, 0.0, 0.0),
    }


CHECKS = {
    "input.hidden_l0": replay.Check(encoder, given=("input.",)),
    "output.kept_a": replay.Check(filters, given=("input.",)),
    "output.filter_keeps": replay.Check(chain, given=("input.",), corrected=processed),
    "param.norm.weight": replay.Check(whole, given=("input.", "param.", "output.decode_official")),
}
