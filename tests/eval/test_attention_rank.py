"""ARank against numpy's singular values of the maps that eager attention returns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import vtc
from vtc.errors import UnsupportedModel, VTCError
from vtc.eval.training.attention_rank import attention_ranks, lowest
from vtc.testing import tiny_inputs, tiny_model

LAYOUT: Any = [[4, "image", 3, "image", 5], [2, "image", 12], [9]]


@pytest.mark.parametrize("name", ["llava-clip", "qwen2.5-vl"])
@torch.no_grad()
def test_ranks_are_those_of_eager_maps_row_by_row(name: str) -> None:
    eager = tiny_model(name, attn_implementation="eager")
    maps: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(lambda module, args, output: maps.append(output[1]))
        for module in vtc.adapters.of(eager).llm_attention
    ]
    expected = np.zeros(len(hooks))
    for row in range(len(LAYOUT)):
        maps.clear()
        eager(**tiny_inputs(name, LAYOUT, seed=3, only=row, model=eager))
        for layer, weights in enumerate(maps):
            for head in weights[0].double().numpy():
                values = np.linalg.svd(head - np.diag(np.diag(head)), compute_uv=False)
                expected[layer] += (values > len(head) * np.finfo(np.float32).eps * values[0]).sum() / len(weights[0])
    expected /= len(LAYOUT)
    model = tiny_model(name)
    padded = attention_ranks(model, [tiny_inputs(name, LAYOUT, seed=3, model=model)])
    alone = [tiny_inputs(name, LAYOUT, seed=3, only=row, model=model) for row in range(len(LAYOUT))]
    assert torch.allclose(attention_ranks(model, alone), torch.tensor(expected).float(), atol=0.09)
    assert torch.allclose(padded, torch.tensor(expected).float(), atol=0.09)
    assert len(set(padded.tolist())) > 1


def test_layers_of_lowest_rank_route() -> None:
    layers = lowest(torch.tensor([1.0, 9.0, 4.0, 4.0]), 2)
    assert layers == (2, 3) and lowest(torch.tensor([9.0, 4.0, 4.0]), 1) == (1,)
    assert (
        vtc.create("ranked_routing", layers=layers).least_retention(vtc.adapters.of(tiny_model("llava-clip")).spec)
        == 0.5
    )
    for wrong in (0, 4):
        with pytest.raises(VTCError, match=f"count={wrong} of 4 layers cannot be skipped; write 1 to 3"):
            lowest(torch.zeros(4), wrong)
    with pytest.raises(VTCError, match="no prompts to measure ranks on"):
        attention_ranks(tiny_model("llava-clip"), [])
    with pytest.raises(UnsupportedModel, match="runs eager attention"):
        attention_ranks(tiny_model("llava-clip", attn_implementation="eager"), [])
