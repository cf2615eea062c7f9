"""SAISA: trained projectors feed encoder features to every layer of the LLM (arXiv:2502.02458)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from vtc.errors import UnsupportedMethod
from vtc.method.base import ModelSpec, Needs, Plan, Rows, Selection, StageView
from vtc.method.learned import LearnedCompressor
from vtc.method.registry import register


@register
class SAISA(LearnedCompressor):
    """Overwrite the visual rows in front of every LLM layer by what that layer's own projector makes of the picture.

    Acts inside the LLM; learned, sees no text, ranks nothing, drops nothing. X are the rows that leave the encoder's
    feature layer. Each layer l of the LLM has a projector P_l, ``Linear - GELU - Linear`` from their width to that of
    the LLM. Before layer l the visual rows become ``P_l(X)``; text rows attend to their keys and values as ever. Visual
    tokens thus learn nothing from each other or from text inside the LLM.

    Saves nothing as it is: the paper computes no queries and no MLP for visual rows, here every layer computes them and
    throws them away, so that logits are those of the paper, but retention and costs those of the untouched model, and
    the projectors come on top. No retention or keep is given.

    weights: a file or embedded name, see `vtc train --method saisa`; ``layerL.0`` and ``layerL.2`` are the two linear
    maps of layer L. residual: rows are ``P(X) + P_l(X)``, with P the model's own projector, and fresh projectors add
    nothing.

    Departures from the paper and its code: residual is ours; of an encoder of which several layers are projected, X is
    the deepest alone; where a token of the LLM is made of several patches, X is their mean; newline tokens are none of
    the picture and pass through the LLM as text does; several pictures, videos and batches work, of which the released
    code has none; the paper trains the LLM as well.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> vtc.create("saisa").plan(llava).stages == tuple(range(32)), vtc.create("saisa").needs_budget
    (True, False)
    """

    residual: bool = False

    name: ClassVar[str] = "saisa"

    @property
    def needs_budget(self) -> bool:
        return False

    def plan(self, model: ModelSpec) -> Plan:
        needs = Needs(vision={model.feature_layer: Rows.HIDDEN})
        return Plan(tuple(range(model.llm_layers)), needs, "preserve")

    def least_retention(self, model: ModelSpec) -> float:
        return 0.0

    def build(self, model: ModelSpec) -> nn.Module:
        if not model.vision_width:
            raise UnsupportedMethod(
                f"{self.name!r} projects encoder features, and the adapter of this {model.family} model does not tell "
                "how wide they are; give its ModelSpec a vision_width"
            )
        return nn.ModuleDict({f"layer{layer}": self._projector(model) for layer in range(model.llm_layers)})

    def _projector(self, model: ModelSpec) -> nn.Module:
        last = nn.Linear(model.width, model.width)
        if self.residual:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        return nn.Sequential(nn.Linear(model.vision_width, model.width), nn.GELU(), last)

    def settings(self, model: ModelSpec) -> dict[str, str]:
        return {"num_layers": str(model.llm_layers), "residual": str(self.residual).lower()}

    def select(self, view: StageView) -> Selection:
        assert isinstance(view.module, nn.ModuleDict)
        if self.residual and view.stage == 0:
            view.memory[self.name] = view.tokens
        projector = view.module[f"layer{view.stage}"]
        features = view.vision_attention(view.model.feature_layer).float()
        rows: Tensor = projector(features.to(next(projector.parameters()).device)).to(view.device)
        if self.residual:
            rows = view.memory[self.name].to(view.device) + rows
        return Selection(view.items.mask, counts=view.items.counts, tokens=rows)
