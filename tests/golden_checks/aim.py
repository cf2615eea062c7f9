"""AIM: merged images and frames, importance and schedule, and a whole LLM with its decode steps.

Merging runs on a LLaVA whose projector is given the case's features and whose last encoder layer has its keys, and on a
LLaVA-OneVision that pools the case's frames. The released code hides tokens instead of removing them; `votes="masked"`
does the same. Two stored outputs describe a fault of its decoding (masks written into the caller's mask); they are
recomputed on the plain LLM with those masks.
"""

from __future__ import annotations

from typing import Any

import _llm as llm
import _replay as replay
import _towers as towers
import torch
from _replay import Attention, Outputs
from torch import Tensor
from transformers import DynamicCache

import vtc
from vtc import adapters
from vtc.method.readings import AttentionCall, QueryRows
from vtc.methods.aim.method import Importance

OPTIONS = {"temperature": "tau", "iterations": "iterations", "damping": "damping"}


def image(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    keys, features, limit = tensors["input.keys"], tensors["input.features"], case["tolerance"]["features"]
    settings = replay.settings(case)["settings"]
    count, heads = keys.shape[1], 4
    query = torch.nn.functional.pad(keys, (0, 0, 1, 0)).unflatten(2, (heads, -1)).transpose(1, 2)
    inputs = towers.prompt(count) | {"pixel_values": towers.pixels(1, 3, 24, 24)}

    def merged(rows: Tensor, setting: dict[str, Any]) -> tuple[Tensor, float, float]:
        model = towers.build("llava", 24, width=rows.shape[2], heads=heads, layers=2)
        adapter = adapters.of(model)
        recorded: dict[str, Any] = {"attention": {adapter.vision_attention[-1]: Attention(query, query)}}
        recorded |= {"entering": {adapter.projector: rows}}
        given = replay.run(model, inputs, vtc.create("aim", prune=False, steps=setting["r"]), **recorded)
        asked = replay.run(model, inputs, vtc.create("aim", prune=False), keep=setting["kept"], **recorded)
        assert torch.equal(given.inputs[0], asked.inputs[0])
        return given.inputs[0][:, 1:-1], 0.0, limit

    return {
        "output.merged_252": merged(features, settings["43.75%"]),
        "output.merged_72": merged(features, settings["12.5%"]),
        "output.metric_252": merged(keys, settings["43.75%"]),
    }


def video(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    settings, limit = replay.settings(case), case["tolerance"]["features"]
    rows, (r, more) = tensors["input.frame_features"], settings["r"]
    frames, side, count = len(rows), settings["grid"][0], 196
    model = towers.build("llava-onevision", side, width=rows.shape[2], layers=2, video_token_index=towers.VIDEO)
    inputs = towers.prompt(frames * count + 1, token=towers.VIDEO)  # a newline at the end
    inputs["pixel_values_videos"] = towers.pixels(1, frames, 3, side, side)

    def entered(method: Any = None, **budget: Any) -> Tensor:
        run = replay.run(model, inputs, method, entering={adapters.of(model).projector: rows}, **budget)
        return run.inputs[0][0, 1:-2].view(frames, -1, rows.shape[2])

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
    run = llm.run(model, method=method, attention={model.model.language_model.layers[at].self_attn: given}, **prompt)
    plain = run.view(at + 1).llm_rows[at, method.reading]  # type: ignore[attr-defined]
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
    official, ids = faulty(model, embeds, decode, valid)
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
        "output.decode_official": (official, 0.0, limits["hidden"]),
        "output.decode_official_positions": (ids, 0.0, 0.0),
    }


@torch.no_grad()
def faulty(model: Any, embeds: Tensor, decode: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The released decoding on the plain LLM: last hidden states and positions.

    valid: [layers, N] what is visible after each layer. Layer l applies the mask behind layer l - 1, layer 0 the
    caller's mask; every step writes the mask behind the last layer into that, and positions count its ones.
    """
    stack, cache = model.model.language_model, DynamicCache()
    length, given = embeds.shape[1], torch.ones(embeds.shape[1], dtype=torch.bool)
    states, ids = [], []
    for step, rows in enumerate([embeds, *decode[:, None, None].unbind()]):
        if step:
            given = torch.cat([given, torch.ones(1, dtype=torch.bool)])
        place = torch.arange(length)[None] if step == 0 else given.sum()[None, None] - 1
        hidden, rotary = rows, stack.rotary_emb(rows, place)
        for number, layer in enumerate(stack.layers):
            keys = given
            if number:
                keys = torch.ones(length + step, dtype=torch.bool)
                keys[:length] = valid[number - 1]
            causal = torch.arange(length + step) <= torch.arange(rows.shape[1])[:, None] + step
            mask = (causal if step == 0 else causal | True) & keys
            hidden = layer(
                hidden, attention_mask=mask[None, None], position_embeddings=rotary, past_key_values=cache,
                position_ids=None, use_cache=True,
            )  # fmt: skip
        if step:
            states.append(stack.norm(hidden)[0])
            ids.append(place[0])
            given = torch.cat([valid[-1], torch.ones(step, dtype=torch.bool)])
    return torch.cat(states), torch.cat(ids)


CHECKS = {
    "input.keys": replay.Check(image, given=("input.",)),
    "input.frame_features": replay.Check(video, given=("input.",)),
    "input.layer_scores": replay.Check(importance, given=("input.",)),
    "input.decode_embeds": replay.Check(whole, given=("input.", "param.")),
}
