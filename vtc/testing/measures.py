"""What the contract measures: differences of logits between a compressed run and what it has to equal."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from vtc import adapters
from vtc.adapters.compat import expands_in_order
from vtc.engine.handle import Handle
from vtc.method.layout import Kind
from vtc.testing.models import TINY_MODELS, Part, tiny_inputs
from vtc.testing.reference import entering, reference
from vtc.testing.snapshot import snapshot


def layouts(name: str) -> dict[str, list[list[Part]]]:
    """Batches of three prompts of different length, by name: two items, one item, none; for families with video also
    videos, and images and videos in one batch. The last one holds every kind of item.
    """
    kinds = TINY_MODELS[name].kinds
    mixed: dict[str, list[list[Part]]] = {kind: [[4, kind, 3, kind, 5], [2, kind, 12], [9]] for kind in kinds}
    if len(kinds) > 1:
        mixed["image and video"] = [[4, "image", 3, "image", 5], [2, "video", 12], [9]]
    return mixed


MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20},
    "beam 3": {"do_sample": False, "num_beams": 3},
    "beam 3, return 2": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampling, return 2": {"do_sample": True, "num_return_sequences": 2},
    "no cache": {"do_sample": False, "use_cache": False},
}


def modes(model: Any) -> dict[str, dict[str, Any]]:
    """The MODES in which this version of transformers gives every sequence the images of its prompt."""
    expanding = {"num_beams", "num_return_sequences"}
    return {k: v for k, v in MODES.items() if expands_in_order(model) or not expanding & set(v)}


Attach = Callable[[Any], Handle]
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@torch.no_grad()
def generate(
    model: Any, inputs: dict[str, Tensor], manager: AbstractContextManager[Any], steps: int = 8, **mode: Any
) -> tuple[Tensor, Tensor]:
    """Sequences [R, S + steps] and logits [steps, R, V] of a seeded generate() call inside `manager`.

    Placeholder ids are never generated: without a cache the untouched model itself would refuse them.
    """
    torch.manual_seed(5)
    with manager:
        output = model.generate(
            **inputs,
            max_new_tokens=steps,
            min_new_tokens=steps,
            return_dict_in_generate=True,
            output_logits=True,
            suppress_tokens=list(adapters.of(model).placeholders.values()),
            **{"do_sample": False, **mode},
        )
    return output.sequences, torch.stack(output.logits)


def against_oracle(model: Any, inputs: dict[str, Tensor], attach: Attach, steps: int = 8, **mode: Any) -> float:
    """Largest logit difference between the compressed model and its oracle; infinite when sampled tokens differ."""
    handle = attach(model)
    with entering(model, handle) as seen:
        try:
            ids, logits = generate(model, inputs, handle, steps, **mode)
        finally:
            handle.detach()
    expected_ids, expected = generate(model, inputs, reference(model, handle, seen), steps, **mode)
    return float((logits - expected).abs().max()) if torch.equal(ids, expected_ids) else float("inf")


def batch_against_singles(
    model: Any, name: str, layout: list[list[Part]], attach: Attach, steps: int = 8, change: Change = dict
) -> float:
    """Largest logit difference between a left-padded batch and its rows one by one. change: applied to all inputs."""
    inputs = change(tiny_inputs(name, layout, seed=3, model=model))
    _, batched = generate(model, inputs, attach(model), steps)
    worst = 0.0
    for row in range(len(layout)):
        single = change(tiny_inputs(name, layout, seed=3, only=row, model=model))
        _, alone = generate(model, single, attach(model), steps)
        worst = max(worst, float((batched[:, row] - alone[:, 0]).abs().max()))
    return worst


def blank(inputs: dict[str, Tensor], share: float = 1.0) -> dict[str, Tensor]:
    """Inputs whose pictures have one colour in their upper `share`, so that all patches there tie."""
    pixels = inputs.get("pixel_values")
    if pixels is None:
        return inputs
    if "image_grid_thw" in inputs:  # [patches, C] of all pictures one behind the other
        parts = list(torch.split(pixels, inputs["image_grid_thw"].prod(1).tolist()))
    else:  # rows in front: [rows, columns, channels] of every crop
        parts = list(pixels.flatten(0, -4).permute(0, 2, 3, 1))
    for place, part in enumerate(parts):
        count, colour = int(len(part) * share), part[:1] if part.ndim == 2 else part[:1, :1]
        parts[place] = torch.cat([colour.expand_as(part)[:count], part[count:]])
    if "image_grid_thw" in inputs:
        return {**inputs, "pixel_values": torch.cat(parts)}
    return {**inputs, "pixel_values": torch.stack(parts).permute(0, 3, 1, 2).reshape(pixels.shape)}


def ties(model: Any, name: str, attach: Attach) -> float:
    """Largest logit difference between a batch and its rows, on pictures that are blank and half blank."""
    layout: list[list[Part]] = [[4, "image", 3, "image", 5], [2, "image", 12], [3, "image", 6]]
    return max(
        batch_against_singles(model, name, layout, attach, 1, functools.partial(blank, share=share))
        for share in (1.0, 0.5)
    )


@torch.no_grad()
def right_padding(model: Any, name: str, layout: list[list[Part]], attach: Attach) -> float:
    """Largest difference of the last prompt token's logits between left- and right-padded inputs."""
    logits = []
    sides: tuple[Literal["left", "right"], ...] = ("left", "right")
    for side in sides:
        inputs = tiny_inputs(name, layout, seed=3, padding=side, extra=1, model=model)
        if not adapters.of(model).spec.mrope:  # models with multi-axis positions derive them from the mask themselves
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with attach(model):
            rows = model(**inputs).logits
        ends = inputs["attention_mask"] * torch.arange(1, inputs["attention_mask"].shape[1] + 1)
        packed = rows.shape[1] < ends.shape[1]  # to the right; where no token was dropped, rows lie as they were given
        logits.append(rows[:, -1] if packed else rows[torch.arange(len(rows)), ends.argmax(1)])
    return float((logits[0] - logits[1]).abs().max())


@torch.no_grad()
def two_turns(model: Any, name: str, kind: Kind, attach: Attach, steps: int = 4) -> float:
    """Largest logit difference to the oracle over two generate() calls on one cache the caller owns."""
    from transformers import DynamicCache

    layout: list[list[Part]] = [[3, kind, 5], [2, kind, 9]]
    inputs = tiny_inputs(name, layout, seed=2, extra=1, model=model)

    def turns(manager: AbstractContextManager[Any]) -> Tensor:
        cache = DynamicCache(config=model.config.get_text_config())
        with manager:
            ids, first = generate(model, inputs, nullcontext(), steps, past_key_values=cache)
            ids = torch.cat([ids, torch.full((2, 6), 7)], dim=1)
            mask = torch.ones_like(ids)
            mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
            more = {"input_ids": ids, "attention_mask": mask}
            if "mm_token_type_ids" in inputs:
                more["mm_token_type_ids"] = torch.zeros_like(ids, dtype=torch.int)
                more["mm_token_type_ids"][:, : inputs["mm_token_type_ids"].shape[1]] = inputs["mm_token_type_ids"]
            _, second = generate(model, more, nullcontext(), steps, past_key_values=cache)
        return torch.cat([first, second])

    handle = attach(model)
    with entering(model, handle) as seen:
        try:
            logits = turns(handle)
        finally:
            handle.detach()
    return float((logits - turns(reference(model, handle, seen))).abs().max())


def identical(model: Any, inputs: dict[str, Tensor], attach: Attach, steps: int = 8) -> float:
    """0.0 when attaching changes no bit of ids and logits, else the largest difference."""
    plain_ids, plain = generate(model, inputs, nullcontext(), steps)
    ids, logits = generate(model, inputs, attach(model), steps)
    if torch.equal(plain, logits) and torch.equal(plain_ids, ids):
        return 0.0
    return max(float((plain - logits).abs().max()), 1e-30)


@torch.no_grad()
def only_the_prompt(model: Any, inputs: dict[str, Tensor], attach: Callable[..., Handle], steps: int = 5) -> float:
    """0.0 when the same tokens are kept whatever follows the prompt, infinite otherwise.

    What follows: a given answer with its prompt's length told, the same marked by labels, drafts of prompt lookup, and
    what generate() without a cache feeds again at every step. attach: takes further options of `vtc.compress`.
    """
    with attach(model) as handle:
        model(**inputs)
    (alone,) = handle.trace
    batch = len(inputs["input_ids"])
    answer = torch.randint(5, 110, (batch, steps), generator=torch.Generator().manual_seed(1))
    longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], answer], dim=1)}
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if name in inputs:
            longer[name] = torch.nn.functional.pad(inputs[name], (0, steps), value=value)
    labels = torch.nn.functional.pad(answer, (longer["input_ids"].shape[1] - steps, 0), value=-100)
    with attach(model, pad_output=True) as handle:
        model(**longer, labels=labels)
    records = handle.trace
    with attach(model, prompt_length=inputs["attention_mask"].sum(1)) as handle:
        model(**longer)
        handle.prompt_length = None
        generate(model, inputs, nullcontext(), 3, use_cache=False)
        if batch == 1:
            generate(model, inputs, nullcontext(), steps, prompt_lookup_num_tokens=3)
    same = all(
        torch.equal(one.heads.get(stage, passed), other.heads.get(stage, other.passed[stage]))
        for record in [*records, *handle.trace]
        for one, other in zip(alone.items, record.items, strict=True)
        for stage, passed in one.passed.items()
        if isinstance(stage, int) or stage in other.passed  # nothing leaves a cache that is not there
    )
    return 0.0 if same else float("inf")


def half_precision(model: Any, inputs: dict[str, Tensor], attach: Attach) -> float:
    """0.0 when a bfloat16 run gives finite logits."""
    model = model.to(torch.bfloat16)
    try:
        cast = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
        _, logits = generate(model, cast, attach(model), 2)
    finally:
        model.float()
    return 0.0 if bool(logits.float().isfinite().all()) else float("inf")


def gradients(model: Any, inputs: dict[str, Tensor], attach: Attach) -> float:
    """0.0 when a loss behind the compressed prompt has finite gradients that reach the projector."""
    with attach(model):
        loss = model(**inputs, use_cache=False).logits[:, -1].square().mean()
        weights = list(adapters.of(model).projector.parameters())
        found = torch.autograd.grad(loss, weights, allow_unused=True)
    reached = [gradient for gradient in found if gradient is not None]
    return 0.0 if reached and all(bool(gradient.isfinite().all()) for gradient in reached) else float("inf")


def no_trace(model: Any, inputs: dict[str, Tensor], attach: Attach) -> float:
    """0.0 when the model is as before after a normal run and after one that raised inside the method."""
    generate(model, inputs, nullcontext(), 1)
    before = snapshot(model)
    generate(model, inputs, attach(model), 2)
    leftovers = float(snapshot(model) != before)
    handle = attach(model)
    layer = adapters.of(model).layers[-1]
    breaker = layer.register_forward_pre_hook(_raise)
    try:
        generate(model, inputs, handle, 2)
    except _Planned:
        pass
    finally:
        breaker.remove()
    return leftovers + float(snapshot(model) != before)


class _Planned(Exception):
    pass


def _raise(module: Any, args: Any) -> None:
    raise _Planned
