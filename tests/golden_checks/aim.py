"""AIM: merged images and frames, importance and schedule, and a whole LLM with its decode steps.

Merging runs on a LLaVA whose projector is given the case's features and whose last encoder layer has its keys, and on a
LLaVA-OneVision that pools the case's frames. The released code hides tokens instead of removing them; `votes="masked"`
does the same. What is stored of its own decoding, which writes masks into the caller's, is not compared: nothing here
decodes so.
"""

from __future__ import annotations

from typing import Any

import _llm as llm
import _replay as replay
import _towers as towers
import torch
from _replay import Attention, Outputs
from torch import Tensor

import vtc
from vtc import adapters
from vtc.method.readings import AttentionCall, QueryRows
from vtc.methods.aim.method import Importance

OPTIONS = {"temperature": "tau", "iterations": "iterations", "damping": "damping"}


def image(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    keys, features, limit = tensors["input.keys"], tensors["input.features"], case["tolerance"]["features"]
    settings = replay.settings(case)["settings"]
    heads = torch.nn.functional.pad(keys, (0, 0, 1, 0)).unflatten(2, (4, -1)).transpose(1, 2)

    def merged(rows: Tensor, setting: dict[str, Any]) -> tuple[Tensor, float, float]:
        tower = towers.build("llava", 24, rows.shape[2], heads=4, layers=2)
        recorded: dict[str, Any] = {"attention": {1: Attention(heads, heads)}, "projected": rows}
        given = tower.run(vtc.create("aim", prune=False, steps=setting["r"]), **recorded)
        asked = tower.run(vtc.create("aim", prune=False), keep=setting["kept"], **recorded)
        assert torch.equal(given.inputs[0], asked.inputs[0])
        return given.inputs[0][:, 1:-1], 0.0, limit

    return {
        "output.merged_252": merged(features, settings["43.75%"]),
        "output.merged_72": merged(features, settings["12.5%"]),
        "output.metric_252": merged(keys, settings["43.75%"]),
    }


def video(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    settings, limit, rows = replay.settings(case), case["tolerance"]["features"], tensors["input.frame_features"]
    (r, more), (frames, _, width), side = settings["r"], rows.shape, settings["grid"][0]
    tokens = frames * 196 + 1  # and a newline
    tower = towers.build("llava-onevision", side, width, crops=frames, tokens=tokens, layers=2)

    def entered(method: Any = None, **budget: Any) -> Tensor:
        return tower.run(method, projected=rows, **budget).inputs[0][0, 1:-2].view(frames, -1, width)

    merged = entered(vtc.create("aim", prune=False, steps=(r, more)))
    kept = settings["kept_per_frame"]
    assert torch.equal(merged, entered(vtc.create("aim", prune=False), keep=frames * kept + 1))
    return {
        "output.pooled": (entered(), 0.0, limit),
        "output.half": (entered(vtc.create("aim", prune=False, steps=(r,))), 0.0, limit),
        "output.merged": (merged, 0.0, limit),
    }


def read(method: Any, attention: Attention, mask: Tensor) -> Tensor:
    """[B, L] what the method reads of one layer's attention in which only `mask` [B, L] receives anything."""
    every, last = torch.ones_like(mask), torch.tensor([[mask.shape[1] - 1]])
    rows = QueryRows(every, every, every, mask.shape[1], last, mask)
    return method.reading.read(AttentionCall(*attention[:2], None, attention.scaling, True), rows)


def importance(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    """The importance of one layer's attention, and the schedule on prescribed scores, both in the LLM's layers."""
    settings, limit = replay.settings(case), case["tolerance"]["importance"]
    first, visual, layers = settings["n_system_tokens"], settings["n_visual"], settings["num_layers"]
    total = first + visual + settings["n_text"]
    prompt: dict[str, Any] = {"embeds": llm.numbered(total, 32), "start": first, "image": visual}
    given = Attention(tensors["input.q"], tensors["input.k"], tensors["input.q"].shape[-1] ** -0.5)
    model = llm.bare(image=visual, layers=layers, width=32, heads=settings["heads"])
    method = vtc.create("aim", merge=False, schedule=(settings["l1"], settings["l2"]), **replay.options(case, OPTIONS))
    at, schedule = settings["l1"], vtc.create("aim").bounds(adapters.of(model).spec)  # type: ignore[attr-defined]
    assert schedule == (settings["l1"], settings["l2"])
    run = llm.run(model, method=method, attention={at: given}, **prompt)
    plain = run.at(at + 1)[0].llm_rows[at, method.reading]  # type: ignore[attr-defined]
    masked = read(method, given, tensors["input.valid_masked"])

    scores = {Importance: lambda layer, rows: tensors["input.layer_scores"][layer][:, llm.numbers(rows[0])]}
    alive = llm.run(model, method=method, readings=scores, **prompt)
    valid = torch.zeros(layers, total, dtype=torch.bool)
    for layer in range(layers):  # what is visible to the next layer
        left = alive.inputs[layer + 1] if layer + 1 < layers else alive.inputs[layer]
        valid[layer, llm.numbers(left)] = True
    return {
        "output.importance": (plain, 0.0, limit),
        "output.importance_masked": (masked, 0.0, limit),
        "output.valid_after_layer": (valid, 0.0, 0.0),
        "output.visual_count_after_layer": (valid[:, first : first + visual].sum(1), 0.0, 0.0),
    }


def whole(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    settings, limits = replay.settings(case), case["tolerance"]
    first, visual, layers = settings["n_system_tokens"], settings["n_visual"], settings["config"]["num_hidden_layers"]
    embeds, decode = tensors["input.inputs_embeds"], tensors["input.decode_embeds"]
    model = llm.build(settings["config"], llm.weights(tensors, "param."), image=visual)
    schedule = settings["l1"], settings["l2"]
    method = vtc.create("aim", merge=False, schedule=schedule, votes="masked", **replay.options(case, OPTIONS))
    run = llm.run(model, embeds, decode, start=first, image=visual, method=method)
    steps = torch.stack([torch.cat(call).flatten() for call in run.positions[1:]])
    assert bool((steps == steps[:, :1]).all())  # every layer of a step
    valid = torch.ones(layers, embeds.shape[1], dtype=torch.bool)
    for view, answer in run.calls:
        if answer is not None:
            valid[view.stage - 1 :, first : first + visual] &= ~answer.hide[0]  # nothing comes back
    seen = {pair: row for view, _ in run.calls for pair, row in view.llm_rows.items()}  # the others were not needed
    before = torch.cat([torch.ones_like(valid[:1]), valid[:-1]])[:, None]
    columns = zip(range(layers), before, strict=True)
    mass = [seen.get((n, method.reading), read(method, run.attention[n], mask)) for n, mask in columns]
    return {
        "output.importance": (torch.cat(mass), 0.0, limits["importance"]),
        "output.valid_after_layer": (valid, 0.0, 0.0),
        "output.last_hidden_state": (run.states[0], 0.0, limits["hidden"]),
        "output.decode_corrected": (torch.cat(run.states[1:]), 0.0, limits["hidden"]),
        "output.decode_corrected_positions": (steps[:, 0], 0.0, 0.0),
    }


CHECKS = {
    "input.keys": replay.Check(image, given=("input.",)),
    "input.frame_features": replay.Check(video, given=("input.",)),
    "input.layer_scores": replay.Check(importance, given=("input.",)),
    "input.decode_embeds": replay.Check(whole, given=("input.", "param.", "output.decode_official")),
}
