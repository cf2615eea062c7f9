"""AIM: merged images and frames, importance and schedule, and a whole LLM with its decode steps.

The released code hides tokens instead of removing them; `votes="masked"` does the same. Two stored outputs describe a
fault of its decoding (masks written into the caller's mask); they are recomputed on the plain LLM with those masks.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from vtc.method.base import AFTER_PREFILL, ModelSpec, Needs, Plan, StageView
from vtc.methods.aim.importance import pagerank
from vtc.methods.aim.method import AIM
from vtc.ops.merge import bipartite_merge, merge_plan, merge_rows
from vtc.ops.select import top_k

INPUTS = ("param.",)
Outputs = dict[str, tuple[Tensor, float, float]]
QWEN = ModelSpec("llava-onevision", 27, 26, False, tuple(range(27)), 28)


def check(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    checks = {"case1": image, "case2": video, "case3": importance, "case4": whole}
    return checks[case["case"]](case, tensors)


def merged(metric: Tensor, features: Tensor, keep: int) -> Tensor:
    """[G, keep, D] features after merging on `metric`, all groups of one size."""
    groups, count, _ = metric.shape
    merge = bipartite_merge(metric, [count] * groups, [merge_plan(count, keep)] * groups)
    return merge_rows(features, merge.target, merge.weight, keep)


def image(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    keys, features, limit = tensors["input.keys"], tensors["input.features"], case["tolerance"]["features"]
    for setting in case["hyperparameters"]["settings"].values():
        assert merge_plan(576, setting["kept"]) == setting["r"]
    return {
        "output.merged_252": (merged(keys, features, 252), 0.0, limit),
        "output.merged_72": (merged(keys, features, 72), 0.0, limit),
        "output.metric_252": (merged(keys, keys, 252), 0.0, limit),
    }


def video(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    frames, limit = tensors["input.frame_features"], case["tolerance"]["features"]
    config = SimpleNamespace(vision_config=SimpleNamespace(image_size=27, patch_size=1))
    pooled = LlavaOnevisionModel.apply_pooling(SimpleNamespace(config=config), frames)
    assert merge_plan(196, 49) == case["hyperparameters"]["r"]
    return {
        "output.pooled": (pooled, 0.0, limit),
        "output.half": (merged(pooled, pooled, 98), 0.0, limit),
        "output.merged": (merged(pooled, pooled, 49), 0.0, limit),
    }


def importance(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    settings, limit = case["hyperparameters"], case["tolerance"]["importance"]
    method = AIM()
    assert method.bounds(QWEN) == (settings["l1"], settings["l2"])
    query, key, scaling = tensors["input.q"], tensors["input.k"], tensors["input.q"].shape[-1] ** -0.5
    sharp = {"tau": method.tau, "iterations": method.iterations, "damping": method.damping, "causal": True}
    assert (method.tau, method.iterations, method.damping) == (
        settings["temperature"], settings["iterations"], settings["damping"],
    )  # fmt: skip
    first, visual = settings["n_system_tokens"], settings["n_visual"]
    total = first + visual + settings["n_text"]
    counts = [*method.layer_counts(QWEN, visual, None), 0]
    alive = torch.zeros(1, total, dtype=torch.bool)
    alive[:, first : first + visual] = True
    text, valid = ~alive, []
    for layer, scores in enumerate(tensors["input.layer_scores"]):
        alive = top_k(scores, torch.tensor([counts[layer + 1]]), alive)
        valid.append((alive | text)[0])
    return {
        "output.importance": (pagerank(query, key, scaling, **sharp), 0.0, limit),
        "output.importance_masked": (
            pagerank(query, key, scaling, mask=tensors["input.valid_masked"], **sharp),
            0.0,
            limit,
        ),
        "output.valid_after_layer": (torch.stack(valid), 0.0, 0.0),
        "output.visual_count_after_layer": (torch.stack(valid)[:, first : first + visual].sum(1), 0.0, 0.0),
    }


@dataclass(frozen=True)
class Watched(AIM):
    """AIM that reads every layer and remembers what it hid."""

    def reads(self, model: Any, layer: int, memory: Any) -> bool:
        return True

    def plan(self, model: ModelSpec) -> Plan:
        plan = super().plan(model)
        llm = dict.fromkeys(range(model.llm_layers), self.reading)
        return Plan((*plan.stages, AFTER_PREFILL), Needs(plan.needs.vision, llm), plan.positions)

    def select(self, view: StageView) -> Any:
        if view.stage == AFTER_PREFILL:
            SEEN["scores"] = torch.stack([view.llm_rows[layer, self.reading][0] for layer in range(28)])
            return None
        selection = super().select(view)
        SEEN[view.stage] = view.memory.get((self, "seen"), view.items.mask)[0]
        return selection


SEEN: dict[Any, Tensor] = {}


def whole(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    spec = importlib.util.spec_from_file_location("golden_llm", Path(__file__).with_name("_llm.py"))
    assert spec is not None and spec.loader is not None
    llm = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(llm)

    settings, limits = case["hyperparameters"], case["tolerance"]
    first, visual = settings["n_system_tokens"], settings["n_visual"]
    embeds, decode = tensors["input.inputs_embeds"], tensors["input.decode_embeds"]
    model = llm.build(settings["config"], llm.weights(tensors, "param."), image=visual)
    positions: list[Tensor] = []
    rotary = model.model.language_model.rotary_emb
    hook = rotary.register_forward_hook(lambda module, args, output: positions.append(args[1].flatten()))
    method = Watched(merge=False, schedule=(settings["l1"], settings["l2"]), votes="masked")
    run = llm.run(model, embeds, decode, start=first, image=visual, method=method)
    hook.remove()
    steps = torch.cat([position for position in positions if len(position) == 1]).view(len(decode), -1)
    assert bool((steps == steps[:, :1]).all())  # every layer of a step

    layers = settings["config"]["num_hidden_layers"]
    valid = torch.ones(layers, embeds.shape[1], dtype=torch.bool)
    for layer in range(layers - 1):
        seen = [stage for stage in SEEN if isinstance(stage, int) and stage <= layer + 1]
        valid[layer, first : first + visual] = SEEN[max(seen)] if seen else True
    valid[-1, first : first + visual] = False
    official, ids = faulty(model, embeds, decode, valid)
    return {
        "output.importance": (SEEN["scores"], 0.0, limits["importance"]),
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
