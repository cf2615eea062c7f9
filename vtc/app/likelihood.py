"""How likely given completions of prompts are: one prefill of prompt and completion, under a method or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from vtc.app.preparation import on_device
from vtc.errors import InputError, VTCError

if TYPE_CHECKING:
    from vtc.app.answer import Answerer, Batch
    from vtc.engine.handle import Handle

IGNORED = -100


@dataclass(frozen=True)
class Likelihood:
    """Of one completion: the mean negative log-likelihood of its tokens, and whether each is the most likely one."""

    loss: float
    greedy: bool
    tokens: int


@torch.inference_mode()
def likelihoods(
    answerer: Answerer, batch: Batch, completions: Sequence[str], handle: Handle | None = None
) -> list[Likelihood]:
    """The B likelihoods of `completions` behind the prompts of `batch`, under the method that `handle` is attached to.

    A method sees the prompt alone, as it does when answers are generated. White space in front of a completion is
    dropped where the prompt ends in white space.

    Raises:
        InputError: an empty completion, or one without tokens.
        VTCError: the model computes NaN.
    """
    tokenizer = answerer.processor.tokenizer
    endings = tokenizer.batch_decode(batch.inputs["input_ids"][:, -1:])
    ids = [
        tokenizer(text.lstrip() if end[-1:].isspace() else text, add_special_tokens=False)["input_ids"]
        for text, end in zip(completions, endings, strict=True)
    ]
    for text, tokens in zip(completions, ids, strict=True):
        if not tokens:
            raise InputError(f"completion {text!r} has no tokens; give at least one word")
    inputs, labels = completed(batch.inputs, ids, tokenizer.pad_token_id)
    longest = max(map(len, ids))
    if handle is not None:
        batch.tell(handle)
        handle.prompt_length = tuple(batch.inputs["attention_mask"].sum(1).tolist())
    output = on_device(answerer.model, lambda: answerer.model(**inputs, logits_to_keep=longest + 1, use_cache=False))
    logits: Tensor = output.logits[:, -longest - 1 : -1].float()
    wanted = labels[:, -longest:]
    losses = cross_entropy(logits.transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none")
    counts = (wanted != IGNORED).sum(1)
    means = losses.sum(1) / counts
    greedy = ((logits.argmax(-1) == wanted) | (wanted == IGNORED)).all(1)
    if not bool(means.isfinite().all()):
        raise VTCError("the model's scores of a completion are NaN or infinite; try --dtype bfloat16 or float32")
    return [Likelihood(*entry) for entry in zip(means.tolist(), greedy.tolist(), counts.tolist(), strict=True)]


def completed(
    inputs: Mapping[str, Any], completions: Sequence[Sequence[int]], padding: int
) -> tuple[dict[str, Any], Tensor]:
    """`inputs` (B, S) with a completion behind each row, left-padded again, and labels (B, S') of completions alone."""
    ids: Tensor = inputs["input_ids"]
    mask = inputs["attention_mask"]
    grown: dict[str, Any] = dict(inputs)
    rows = [row[kept.bool()] for row, kept in zip(ids, mask, strict=True)]
    length = max(len(row) + len(more) for row, more in zip(rows, completions, strict=True))

    def joined(values: Tensor, behind: Sequence[Sequence[int]], fill: int) -> Tensor:
        made = []
        for row, kept, more in zip(values, mask, behind, strict=True):
            whole = torch.cat([row[kept.bool()], row.new_tensor(more)])
            made.append(pad(whole, (length - len(whole), 0), value=fill))
        return torch.stack(made)

    for name, values in inputs.items():
        if isinstance(values, Tensor) and values.shape == ids.shape:
            zeros = [[0] * len(more) for more in completions]
            ones = [[1] * len(more) for more in completions]
            behind = {"input_ids": completions, "attention_mask": ones}.get(name, zeros)
            grown[name] = joined(values, behind, padding if name == "input_ids" else 0)
    return grown, joined(torch.full_like(ids, IGNORED), completions, IGNORED)
