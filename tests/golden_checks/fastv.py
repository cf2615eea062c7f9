"""FastV: attention of the layer in front, kept tokens, what the later layers get, and a decode step, on a tiny LLM."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.method.base import ModelSpec, Needs, Plan, Rows, Selection, StageView
from vtc.method.readings import AttentionCall, LLMReading, QueryRows
from vtc.methods.fastv import FastV
from vtc.ops.attention import attention_rows

spec = importlib.util.spec_from_file_location("golden_llm", Path(__file__).with_name("_llm.py"))
assert spec is not None and spec.loader is not None
llm = importlib.util.module_from_spec(spec)
spec.loader.exec_module(llm)


@dataclass(frozen=True)
class EveryHead(LLMReading):
    """The whole attention matrix of every head, [H, Q, B, K]."""

    name = "every head"

    def read(self, attention: AttentionCall, rows: QueryRows) -> Tensor:
        query, key = attention.query, attention.key
        every = torch.arange(query.shape[2])[None].expand(len(query), -1)
        shared = query.shape[1] // key.shape[1]
        heads = [
            attention_rows(query[:, h : h + 1], key[:, h // shared][:, None], every, attention.scaling, causal=True)
            for h in range(query.shape[1])
        ]
        return torch.stack(heads).transpose(1, 2)


class Watched(FastV):
    """The method, telling what it saw."""

    seen: ClassVar[dict[str, Tensor]] = {}

    def plan(self, model: ModelSpec) -> Plan:
        plan = super().plan(model)
        return Plan(plan.stages, plan.needs | Needs(llm={self.layer - 1: EveryHead()}), plan.positions)

    def select(self, view: StageView) -> Selection:
        self.seen["attn"] = view.llm_rows[self.layer - 1, EveryHead()][:, :, 0]
        self.seen["score"] = view.llm_attention(self.layer - 1, Rows.LAST)[0]
        return super().select(view)


def check(case: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, float, float]]:
    if case["case"] != "case1":
        raise ValueError(f"unknown case {case['case']}")
    settings = case["hyper_parameters"]
    start, image, layer, keep = settings["image_start"], settings["num_image"], settings["K"], settings["keep"]
    prompt = tensors["in.inputs_embeds"], tensors["in.decode_embeds"]
    model = llm.build(case["llama_config"], llm.weights(tensors, "w."), image=image)
    published = llm.run(model, *prompt, start=start, image=image, method=Watched(layer=layer, ratio=settings["R"]))
    layers = len(published.inputs)
    mean = (layer * image + (layers - layer) * keep) // layers
    run = llm.run(model, *prompt, start=start, image=image, method=FastV(layer=layer), keep=mean)
    assert run.kept[layer].tolist() == published.kept[layer].tolist()
    assert run.lengths == case["kv_cache_lengths_after_prefill"]
    return {
        "mid.attn": (Watched.seen["attn"], 1e-4, 1e-7),
        "mid.score": (Watched.seen["score"], 1e-4, 0.0),
        "out.keep_index": (run.alive[layer], 0.0, 0.0),
        "out.kept_image": (run.kept[layer], 0.0, 0.0),
        "out.hidden_after_prune": (run.inputs[layer][None], 0.0, 2e-4),
        "out.last_hidden_state": (run.states[0][None], 0.0, 2e-4),
        "out.decode_last_hidden_state": (run.states[1][None], 0.0, 2e-4),
    }
