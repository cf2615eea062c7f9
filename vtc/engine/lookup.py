"""Rows that no layer of the language model sees are neither embedded nor copied.

A backbone embeds every id and scatters the encoder's outputs among the embeddings, before the language model is called.
Where a method drops tokens in front of it, the backbone is handed rows of width one instead; what stays is put together
when the method has chosen, with the bits that the backbone would have given it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapters.base import Adapter
from vtc.engine.encoder import MARK, context_of
from vtc.engine.installed import MethodWrapper
from vtc.engine.llm_pass import LLMPass
from vtc.engine.passes import Passes
from vtc.method.layout import Kind
from vtc.method.states import LookedUp, States

OUTPUTS = "mm_encoder_outputs"


@dataclass(eq=False)
class Rows:
    """What stood in for the rows of one pass. features: [n, D] encoder outputs by kind, in the order of their calls."""

    embedding: nn.Embedding
    pending: bool = True  # the ids are still to be embedded
    features: dict[Kind, list[Tensor]] = field(default_factory=dict)

    def narrow(self, kind: Kind, output: Any) -> Any:
        """The same output of the encoder, with features of width one."""
        pooled = output.pooler_output
        parts = [pooled] if isinstance(pooled, Tensor) else list(pooled)
        self.features.setdefault(kind, []).extend(part.flatten(0, -2) for part in parts)
        thin = [part.new_zeros(1).expand(*part.shape[:-1], 1) for part in parts]
        stand_in, context = copy.copy(output), context_of(output)
        stand_in.pooler_output = thin[0] if isinstance(pooled, Tensor) else type(pooled)(thin)
        setattr(stand_in, MARK, context)
        return stand_in

    def joined(self, kind: Kind) -> Tensor:
        """[V, D] all features of a kind, as the backbone would scatter them."""
        weight = self.embedding.weight
        return torch.cat(self.features[kind]).to(weight.device, weight.dtype)


class Lookup:
    """Puts stand-ins in the way of one model's backbone, while installed."""

    def __init__(self, adapter: Adapter, passes: Passes[LLMPass]) -> None:
        self._adapter, self._passes = adapter, passes
        self._wrapper: MethodWrapper | None = None

    def install(self) -> None:
        """Wrap the method by which the backbone asks for its embedding."""
        backbone = self._adapter.backbone
        function = backbone.get_input_embeddings

        def get_input_embeddings() -> Any:
            one = self._passes.current
            if one is None or one.rows is None or not one.rows.pending:
                return function()
            one.rows.pending = False
            weight = one.rows.embedding.weight
            return lambda ids: torch.zeros(1, dtype=weight.dtype, device=weight.device).expand(*ids.shape, 1)

        self._wrapper = MethodWrapper(backbone, "get_input_embeddings", get_input_embeddings)

    def remove(self) -> None:
        """Restore the backbone."""
        if self._wrapper is not None:
            self._wrapper.remove()
            self._wrapper = None

    def begin(self, one: LLMPass, given: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a backbone that is about to run, with stand-ins for encoder outputs among them.

        Nothing is replaced where ids are not what is embedded, or where somebody else looks at the rows.
        """
        embedding = self._adapter.backbone.get_input_embeddings()
        watched = len(self._adapter.language_model._forward_pre_hooks) > 1
        if self._wrapper is None or watched or not _plain(embedding) or given.get("input_ids") is None:
            return kwargs
        if given.get("inputs_embeds") is not None or (given.get(OUTPUTS) and OUTPUTS not in kwargs):
            return kwargs
        one.rows = rows = Rows(embedding)
        outputs = kwargs.get(OUTPUTS)
        if not outputs:
            return kwargs
        thin = {kind: None if output is None else rows.narrow(kind, output) for kind, output in outputs.items()}
        return {**kwargs, OUTPUTS: thin}

    def states(self, one: LLMPass, embeds: Tensor) -> States:
        """The rows that enter the language model, in place of what the backbone hands over."""
        rows = one.rows
        if rows is None or rows.pending or one.placeholders is None or one.ids is None:
            return States(embeds)
        number, before, parts = torch.full_like(one.ids, -1), 0, []
        for kind, mask in zip(self._adapter.placeholders, one.placeholders, strict=True):
            if kind not in rows.features:  # placeholders without media are words
                continue
            parts.append(rows.joined(kind))
            places = mask.flatten().cumsum(0).view(mask.shape) + (before - 1)
            number = torch.where(mask, places, number)
            before += len(parts[-1])
        if not parts:
            return States(rows.embedding(one.ids))
        return LookedUp(rows.embedding, one.ids, number, torch.cat(parts) if len(parts) > 1 else parts[0])

    def restore(self, one: LLMPass, output: Any) -> None:
        """Hand the caller the features that the backbone's output is meant to show."""
        for kind in one.rows.features if one.rows is not None else ():
            shown = getattr(output, name := f"{kind}_hidden_states", None)
            if isinstance(shown, Tensor):
                setattr(output, name, one.rows.joined(kind).view(*shown.shape[:-1], -1))


def _plain(embedding: Any) -> bool:
    """Whether nothing but the lookup happens in an embedding."""
    return (
        isinstance(embedding, nn.Embedding)
        and not embedding._forward_hooks
        and not embedding._forward_pre_hooks
        and not hasattr(embedding, "_hf_hook")
    )
