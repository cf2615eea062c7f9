"""MustDrop: window merging and key set, the dual-attention filter, its chain over four layers and cache, a whole LLM.

Cases 3 and 4 run through `vtc.compress` on the 32-layer LLM of `_llm.py`; a subclass puts in what a case stores of the
steps before (key set, attention). Positions are those that the LLM's rotary embedding is asked for.
"""

from __future__ import annotations

import importlib.util
from bisect import bisect_right
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtc.method.base import CacheStage, ModelSpec, StageView
from vtc.methods.mustdrop.dual import dual_filter, key_tokens
from vtc.methods.mustdrop.method import MustDrop
from vtc.methods.mustdrop.windows import merge_windows, merged_first, raster_windows, window_members, window_similarity
from vtc.ops.select import take_rows

INPUTS = ("param.",)
Outputs = dict[str, tuple[Tensor, float, float]]

spec = importlib.util.spec_from_file_location("golden_llm", Path(__file__).with_name("_llm.py"))
assert spec is not None
assert spec.loader is not None
llm = importlib.util.module_from_spec(spec)
spec.loader.exec_module(llm)


def check(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    return {"case1": encoder, "case2": filters, "case3": chain, "case4": whole}[case["case"]](case, tensors)


# --- step 1
def encoder(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    settings, features = case["hyperparameters"], tensors["input.hidden_l0"][:, 1:]
    height, width = settings["grid"]
    window = (settings["window"][0], settings["window"][1])
    number = raster_windows([(1, height, width)], window)[None]
    members, uncut = window_members(number, int(number.max()) + 1, window[0] * window[1])
    similarity = window_similarity(features, members, uncut)
    chosen = similarity >= settings["threshold"]
    tokens, keep, into = merge_windows(features, members, chosen)
    order = merged_first(keep, members, chosen, similarity)
    raw = torch.arange(height * width)
    home = torch.where(into < 0, raw, into)[0]

    def arranged(values: Tensor) -> Tensor:
        return take_rows(values, order)[keep][None]

    def over_members(start: int, reduce: str) -> Tensor:
        return arranged(torch.full_like(home, start).scatter_reduce(0, home, raw, reduce)[None])

    attention = tensors["input.cls_attn"].mean(1)[:, 1:]
    every = torch.ones_like(attention, dtype=torch.bool)
    key = key_tokens(attention, torch.zeros_like(every, dtype=torch.long), 1, settings["key_rate"], every)
    ranked = attention.masked_fill(~key, -1).argsort(descending=True)[:, : int(key.sum())]
    return {
        "output.features": (arranged(tokens), 1e-5, 1e-5),
        "output.size": (arranged(torch.bincount(home, minlength=len(raw))[None]), 0, 0),
        "output.first_member": (over_members(len(raw), "amin"), 0, 0),
        "output.last_member": (over_members(-1, "amax"), 0, 0),
        "output.key_idx": (ranked, 0, 0),
    }


# --- step 2
def filters(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    rows = tensors["input.text_to_vision_attn"].mean(0)
    mask = torch.ones(1, rows.shape[1], dtype=torch.bool)
    kept = {
        name: dual_filter(rows.sum(0)[None], rows.amax(0)[None], gamma, alpha, mask)[0].nonzero().flatten()
        for name, (gamma, alpha) in case["hyperparameters"]["pairs"].items()
    }
    return {f"output.kept_{name}": (indices, 0, 0) for name, indices in kept.items()}


class Given(MustDrop):
    """With the key set and, where there are some, the [stages, T, N0] attention rows of a case."""

    key_idx: Tensor
    rows: Tensor | None = None

    def keys(self, view: StageView) -> Tensor:
        return torch.isin(view.items.token, self.key_idx) & view.items.mask

    def attention(self, view: StageView, layer: int) -> Tensor:
        if self.rows is None:
            return super().attention(view, layer)
        rows = self.rows[self.layers.index(layer)][:, view.items.token]
        return torch.stack([rows.sum(0), rows.amax(0)])


def method(settings: dict[str, Any], key_idx: Tensor, rows: Tensor | None = None) -> Given:
    """The published filter and cache with a case's thresholds."""
    thresholds = {"gamma": settings["global_thr"], "alpha": settings["individual_thr"]}
    given = Given(merge="off", filter="threshold", layers=tuple(settings["pruning_layers"]), **thresholds)
    object.__setattr__(given, "key_idx", key_idx)
    object.__setattr__(given, "rows", rows)
    return given


class Traced(NamedTuple):
    """A run and the positions of every call and layer; rows: layer -> rows of the prompt that entered it."""

    run: Any
    positions: list[list[Tensor]]
    rows: list[Tensor]


def traced(model: Any, given: Given, official: list[int] | None = None, **prompt: Any) -> Traced:
    """Run a prompt; official: lengths of the layers' caches, by which decoded tokens are then numbered as released."""
    stack = model.model.language_model
    layers = len(stack.layers)
    starts = [0, given.layers[0], *(layer + 1 for layer in given.layers)]
    asked: list[list[Tensor]] = []

    def begin(module: Any, args: Any) -> None:
        asked.append([])

    def number(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Any:
        positions = args[1] if len(args) > 1 else kwargs["position_ids"]
        if official is not None and len(asked) > 1:
            positions = torch.full_like(positions, official[starts[len(asked[-1])]] + len(asked) - 2)
        asked[-1].append(positions)
        return (args[0], positions), {}

    hooks = [
        stack.register_forward_pre_hook(begin),
        stack.rotary_emb.register_forward_pre_hook(number, with_kwargs=True),
    ]
    try:
        run = llm.run(model, method=given, **prompt)
    finally:
        for hook in hooks:
            hook.remove()
    groups = [bisect_right(starts, layer) - 1 for layer in range(layers)]
    every = torch.arange(prompt["embeds"].shape[-2])
    rows = [every if group < 2 else run.alive[starts[group]] for group in groups]
    return Traced(run, [[call[group][0] for group in groups] for call in asked], rows)


# --- steps 2 and 3
def chain(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    from transformers import LlamaConfig, LlamaModel

    settings = case["hyperparameters"]
    system, visual, layers = settings["n_system_tokens"], settings["n_visual"], settings["num_layers"]
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = {**small, "num_hidden_layers": layers, "rope_theta": 1e4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = llm.build(config, LlamaModel(LlamaConfig(**config, vocab_size=8)).state_dict(), image=visual)
        embeds = torch.randn(system + visual + settings["n_text"], 16)
    attention = tensors["input.text_to_vision_attn"].mean(1)
    given = method(settings, tensors["input.key_idx"], attention)
    run, positions, rows = traced(model, given, embeds=embeds, start=system, image=visual)

    def table(lists: list[Tensor], width: int) -> tuple[Tensor, float, float]:
        return torch.stack([torch.nn.functional.pad(each, (0, width - len(each)), value=-1) for each in lists]), 0, 0

    image = [each[(each >= system) & (each < system + visual)] - system for each in rows]
    before = [image[layer] for layer in given.layers]
    alone = [
        dual_filter(part.sum(0)[None], part.amax(0)[None], given.gamma, given.alpha, part[:1] >= 0)[0]
        .nonzero()
        .flatten()
        for part in (block[:, there] for block, there in zip(attention, before, strict=True))
    ]
    final = run.alive[CacheStage(given.layers[0])]
    cached = [each if layer < given.layers[0] else final for layer, each in enumerate(rows)]
    assert [len(each) for each in cached] == run.lengths
    assert all(torch.equal(final, each) for each in rows[given.layers[-1] + 1 :])
    keys = [at[torch.isin(row, some)] for at, row, some in zip(positions[0], rows, cached, strict=True)]
    llama = ModelSpec("llava", 24, 22, True, tuple(range(24)), layers)
    spans = MustDrop(average="official").spans(llama)
    counts = [visual, *(len(run.kept[layer + 1]) for layer in given.layers)]
    per_layer = [count for count, span in zip(counts, spans, strict=True) for _ in range(span)]
    return {
        "output.visual_before": table(before, visual),
        "output.visual_after": table([run.kept[layer + 1] for layer in given.layers], visual),
        "output.filter_keeps": table(alone, visual),
        "output.final_sequence": (rows[-1], 0, 0),
        "output.cache_token": table(cached, len(embeds)),
        "output.cache_position": table(keys, len(embeds)),
        "output.visual_count_per_layer": (torch.tensor(per_layer), 0, 0),
        "output.average_tokens": (torch.tensor([sum(per_layer) / layers], dtype=torch.float64), 1e-6, 0),
    }


# --- a whole LLM
def whole(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    settings, near = case["hyperparameters"], case["tolerance"]["hidden"]
    model = llm.build(settings["config"], llm.weights(tensors, "param."), image=settings["n_visual"])
    prompt = {"embeds": tensors["input.inputs_embeds"], "decode": tensors["input.decode_embeds"]}
    prompt |= {"start": settings["n_system_tokens"], "image": settings["n_visual"]}
    given = method(settings, tensors["input.key_idx"])
    ours = traced(model, given, **prompt)
    official = traced(model, given, ours.run.lengths, **prompt)

    def decoded(found: Traced) -> dict[str, tuple[Tensor, float, float]]:
        states = torch.cat(found.run.states[1:])
        return {"": (states, near, near), "_positions": (torch.tensor(found.positions[1:]), 0, 0)}

    return {
        "output.last_hidden_state": (ours.run.states[0], near, near),
        "output.prefill_length": (torch.tensor([len(each) for each in ours.run.inputs]), 0, 0),
        "output.cache_length": (torch.tensor(ours.run.lengths), 0, 0),
        **{f"output.key_cache_{layer}": (ours.run.keys[layer], near, near) for layer in (1, 2, 8, 31)},
        **{f"output.decode_corrected{name}": found for name, found in decoded(ours).items()},
        **{f"output.decode_official{name}": found for name, found in decoded(official).items()},
    }
