"""ARank: how many directions the attention maps of each LLM layer have (gamma-MoD, arXiv:2410.13859).

An analysis over a few short prompts: whole N x N maps of all heads are held, one layer at a time, and decomposed, which
the readings of methods never do.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vtc import adapters
from vtc.engine.taps import TapSet
from vtc.errors import VTCError
from vtc.method.readings import AttentionCall, exact
from vtc.ops.attention import attention_logits


@torch.no_grad()
def attention_ranks(model: nn.Module, prompts: Iterable[dict[str, Any]]) -> Tensor:
    """[L] rank of each layer's causal attention map without its diagonal, mean over heads and samples.

    prompts: as the model takes them, one pass each; every row of a batch is a sample, padding does not count. Layers of
    low rank are those whose tokens learn least from each other, so that some of them may skip the layer (section 3.2).
    Raises VTCError without prompts, UnsupportedModel for eager attention.

    >>> from vtc.testing import tiny_inputs, tiny_model
    >>> model = tiny_model("llava-clip")
    >>> attention_ranks(model, [tiny_inputs("llava-clip", [[3, "image", 5]], model=model)]).shape
    torch.Size([4])
    """
    modules = adapters.of(model).llm_attention
    found: list[list[Tensor]] = [[] for _ in modules]
    taps = TapSet((module, functools.partial(_note, ranks)) for module, ranks in zip(modules, found, strict=True))
    taps.install()
    try:
        for prompt in prompts:
            model(**prompt)
    finally:
        taps.remove()
    if not found[0]:
        raise VTCError("there are no prompts to measure ranks on; give some, as the model takes them")
    return torch.stack([torch.cat(ranks).mean() for ranks in found])


def lowest(ranks: Tensor, count: int) -> tuple[int, ...]:
    """The `count` layers of lowest rank in rising order, layer 0 not among them: `layers` of `ranked_routing`.

    Raises VTCError where there are not so many.

    >>> lowest(torch.tensor([1.0, 9.0, 4.0, 6.0]), 2)
    (2, 3)
    """
    if not 0 < count < len(ranks):
        raise VTCError(f"count={count!r} of {len(ranks)} layers cannot be skipped; write 1 to {len(ranks) - 1}")
    return tuple(sorted((ranks[1:].argsort(stable=True)[:count] + 1).tolist()))


def _note(ranks: list[Tensor], attention: AttentionCall) -> None:
    """Add [B], the rank of the maps of one call, mean over heads."""
    query, mask = attention.query, attention.mask
    rows = torch.arange(query.shape[2], device=query.device).expand(query.shape[0], -1)
    with exact(query.device):
        logits = attention_logits(query, attention.key, rows, attention.scaling, mask=mask, causal=True)
        maps, real = logits.softmax(-1).tril(-1), torch.ones_like(rows, dtype=torch.bool)
        if mask is not None:  # what is no padding sees itself
            seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
            real = real & seen[:, 0].diagonal(dim1=1, dim2=2)
        # The usual bound below which a singular value counts as zero, of maps without the padding.
        bound = (real.sum(1, keepdim=True) * torch.finfo(maps.dtype).eps).expand(maps.shape[:2])
        rank = torch.linalg.matrix_rank(maps * real[:, None, :, None], rtol=bound)
        ranks.append(rank.float().mean(1).cpu())
