"""p-MoD: trained routers let visual tokens through single layers of the LLM and weigh them (arXiv:2412.04449)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn

from vtc.method.base import ModelSpec, Needs, Plan, Selection, StageView
from vtc.method.learned import LearnedCompressor
from vtc.method.registry import register
from vtc.method.routed import RoutedCompressor
from vtc.ops.host import put

SCALE = 0.2


@register
class PMoD(LearnedCompressor, RoutedCompressor):
    """Let visual tokens skip single layers of the LLM as a trained router of each layer says, and weigh all of them.

    Acts inside the LLM; learned; what a token's own row says decides, so that the question plays a part only where it
    stands in front of the picture. The router of layer l is a linear map of the rows h that arrive there to one number;
    ``w = 0.2 tanh(router_l(h)) + 1`` (TanhNorm). Through the layer goes the share ``c_l = shift + cos(pi l / (L - 1)) /
    2``, at least 0.15, of the visual tokens (progressive ratio decay, section 3.3): those of the largest w, and all
    text. With u = h + attention and m = MLP(norm(u)), tokens that go through leave the layer as ``u + w m``, those that
    go around it as ``w h``, text as ``u + m``. Tokens that go around a layer have no entry in its KV cache and stand at
    the next layer's door again; nothing leaves for good, positions stay, and decoding is plain.

    Cross entropy trains the routers through w alone, by tokens that go through and by those that go around. What leaves
    the last layer of visual tokens nothing reads, so that its router learns nothing.

    weights: a file or embedded name, see `vtc train --method p_mod`; ``layerL.weight`` [1, D] and ``layerL.bias`` [1]
    for every layer L that tokens may skip. Fresh routers are zeros, as in the paper: w is 1 and lower indices go first.
    schedule: the decay, whose shift is solved for, so that the mean over the layers meets the budget; or the share of
    every layer, such as p-MoD's own with the shift 0.5, and then no retention or keep is given. layers: instead, the
    LLM layers that tokens may skip, from 1 on, numbered in this model; all of them let the same share through.

    Departures from the paper and its code: p-MoD trains the whole LLM with its routers, here routers are trained behind
    a frozen one; for a published checkpoint load its LLM as the model and put its routers, under the names above,
    into a file that the method's `save` writes with its settings. The budget is solved for, shares are rounded to
    the nearest token, the first layer sees every token, and shares above 0.85 do not become 1. Every image has its
    own share; a layer that an image's tokens all go through leaves them as they are, w or not; newline tokens skip
    nothing and are not weighed.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> vtc.create("p_mod").plan(llava).skips == tuple(range(1, 32))
    True
    >>> vtc.create("p_mod", weights="p_mod-tiny-llava").trained
    True
    """

    name: ClassVar[str] = "p_mod"

    def plan(self, model: ModelSpec) -> Plan:
        layers = self.routed(model)
        return Plan(layers, Needs(), "preserve", skips=layers, gains=True)

    def build(self, model: ModelSpec) -> nn.Module:
        routers = nn.ModuleDict({f"layer{layer}": nn.Linear(model.width, 1) for layer in self.routed(model)})
        for weight in routers.parameters():
            nn.init.zeros_(weight)
        return routers

    def settings(self, model: ModelSpec) -> dict[str, str]:
        return {"num_layers": str(model.llm_layers), "routed": ",".join(map(str, self.routed(model)))}

    def score(self, view: StageView) -> Tensor:
        assert isinstance(view.module, nn.ModuleDict)
        router = view.module[f"layer{view.stage}"]
        assert isinstance(router, nn.Linear)
        weight, bias = router.weight.to(view.device), router.bias.to(view.device)
        return 1 + SCALE * nn.functional.linear(view.tokens.float(), weight, bias)[..., 0].tanh()

    def select(self, view: StageView) -> Selection | None:
        selection = super().select(view)
        if selection is None:
            return None
        assert selection.counts is not None and selection.scores is not None
        less = put([kept < now for kept, now in zip(selection.counts, view.items.counts, strict=True)], view.device)
        return dataclasses.replace(selection, gains=torch.where(less[:, None], selection.scores, 1.0))
