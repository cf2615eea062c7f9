"""Running a whole model on what a stored case recorded, so that a method meets the case's tensors and nothing else.

A model is built in the case's sizes and run through `vtc.compress` as a user would. On the way recorded tensors take
the place of what random weights compute: rows that enter a module, and the queries and keys of an attention layer.
Readings, plan, stages, packing, positions and caches are those of the library; layers that nothing was recorded of keep
their random attention, so a method that reads another layer than the published one chooses other tokens.

A checker lists in CHECKS which of its functions belongs to a case, by the name of a tensor that such a case has::

    CHECKS = {"in.cls_attn": replay.Check(check, given=("in.",))}

A function gets the case's description and its given tensors and returns name -> (tensor, rtol, atol) for all others, 0
and 0 asking for equality. `options` translates the description's hyper-parameters by the checker's table.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtc
from vtc import adapters
from vtc.method.base import Compressor, Selection, Stage, StageView
from vtc.method.readings import LLMReading

Outputs = dict[str, tuple[Tensor, float, float]]


@dataclass(frozen=True)
class Check:
    """How cases of one kind are checked.

    run: (description, given tensors) -> every other tensor. given: names or prefixes of what is given, or says nothing
    about this library. corrected: (description, all tensors) -> values that replace stored ones, where the case's own
    arithmetic is at fault.
    """

    run: Callable[[dict[str, Any], dict[str, Tensor]], Outputs]
    given: tuple[str, ...]
    corrected: Callable[[dict[str, Any], dict[str, Tensor]], dict[str, Tensor]] = lambda case, tensors: {}

    def inputs(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The given ones among a case's tensors."""
        return {name: tensor for name, tensor in tensors.items() if name.startswith(self.given)}


def settings(case: dict[str, Any]) -> dict[str, Any]:
    """The hyper-parameters of a description, whatever it calls them."""
    return next(case[name] for name in ("hyper_parameters", "hyperparameters", "params") if name in case)


def options(case: dict[str, Any], table: Mapping[str, str]) -> dict[str, Any]:
    """Our hyper-parameters from a case's; table: their name there -> here. Lists become tuples."""
    given = settings(case)
    found = {ours: given[theirs] for theirs, ours in table.items() if theirs in given}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


# --- recorded attention
class Attention(NamedTuple):
    """Queries and keys [crops, heads, T, width] of one layer, as its softmax sees them."""

    query: Tensor
    key: Tensor
    scaling: float = 1.0


def logits(weights: Tensor) -> Tensor:
    """What a softmax makes `weights` of, up to a constant that keeps them small; float32."""
    found = weights.double().clamp(min=1e-30).log()
    return (found - found.mean(-1, keepdim=True)).float()


def class_row(row: Tensor) -> Attention:
    """A layer whose first row has the logits `row` [crops, heads, T]; all other rows are even."""
    query = torch.zeros_like(row).index_fill(-1, torch.tensor(0), 1)
    return Attention(query[..., None], row[..., None])


def every_row(row: Tensor) -> Attention:
    """A layer all of whose rows have the logits `row` [crops, heads, T]."""
    return Attention(torch.ones_like(row)[..., None], row[..., None])


def all_rows(rows: Tensor) -> Attention:
    """A layer with the logits `rows` [crops, heads, T, T]."""
    return Attention(rows, torch.eye(rows.shape[-1]).expand_as(rows))


# --- running
@dataclass
class Run:
    """What a prompt and its decode steps left behind.

    states: last hidden state (after the final norm) of every call, [B, rows, D]. inputs: rows that entered every LLM
    layer at the prefill, [B, rows, D]. keys: rotated keys of every layer after the prefill, [B, heads, rows, D].
    positions: of every call, what the rotary embedding was asked for, one tensor per group of layers. attention: of
    every LLM layer at the prefill. calls: (view, answer) of every stage.
    """

    states: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    positions: list[list[Tensor]] = field(default_factory=list)
    attention: dict[int, Attention] = field(default_factory=dict)
    calls: list[tuple[StageView, Selection | None]] = field(default_factory=list)
    handle: Any = None

    @property
    def kept(self) -> dict[Stage, Tensor]:
        """Stage -> image tokens of the first item that passed it, in ascending order."""
        return self.handle.trace[0].items[0].kept  # type: ignore[no-any-return]

    @property
    def alive(self) -> dict[Stage, Tensor]:
        """Stage -> rows of the first prompt that are left behind it, text too."""
        return {stage: rows[0].nonzero().flatten() for stage, rows in self.handle.trace[0].keep.items()}

    @property
    def lengths(self) -> list[int]:
        """Rows in every layer's cache after the prefill."""
        return [each.shape[-2] for each in self.keys]

    def at(self, stage: Stage) -> tuple[StageView, Selection]:
        """What the method was shown at a stage, and what it answered."""
        return next((view, answer) for view, answer in self.calls if view.stage == stage and answer is not None)


@torch.no_grad()
def run(
    model: Any,
    inputs: dict[str, Tensor],
    method: Compressor | None = None,
    *,
    rows: Sequence[Tensor] = (),
    entering: Mapping[nn.Module, Tensor] | None = None,
    attention: Mapping[nn.Module, Attention | Callable[[Tensor], Attention]] | None = None,
    readings: Mapping[type[LLMReading], Callable[[int, Tensor], Tensor]] | None = None,
    **options: Any,
) -> Run:
    """Prefill with `inputs`, then one decode step for every further entry of `rows`.

    rows: [B, L, D] what enters the LLM in place of the embeddings, for the prefill and for every step. entering: what
    enters a module in place of its own input. attention: queries and keys of an attention module, or a function of the
    rows [B, L, D] that entered its LLM layer. readings: kind of reading -> what is read of an LLM layer, from its
    number and those rows, in place of its own. method: None runs the model alone. options: of `vtc.compress`.
    """
    stack, found = adapters.of(model).language_model, Run()
    recorded = {id(module): each for module, each in (attention or {}).items()}
    numbers = {id(layer.self_attn): number for number, layer in enumerate(stack.layers)}

    def feed(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        found.positions.append([])
        if rows:
            kwargs["inputs_embeds"] = rows[len(found.states)]
        return args, kwargs

    def ask(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        found.positions[-1].append(args[1] if len(args) > 1 else kwargs["position_ids"])

    def enter(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if not found.states:
            found.inputs.append((args[0] if args else kwargs["hidden_states"]).clone())

    def leave(module: Any, args: Any, output: Any) -> None:
        found.states.append(output.last_hidden_state.clone())

    with contextlib.ExitStack() as hooks:

        def hook(handle: Any) -> None:
            hooks.callback(handle.remove)

        for module, given in (entering or {}).items():
            hook(module.register_forward_pre_hook(lambda module, args, given=given: (given, *args[1:])))
        hook(stack.register_forward_pre_hook(feed, with_kwargs=True))
        hook(stack.rotary_emb.register_forward_pre_hook(ask, with_kwargs=True))
        for kind, read in (readings or {}).items():
            told = lambda *_, read=read: read(len(found.inputs) - 1, found.inputs[-1])  # noqa: E731
            hooks.enter_context(watched(kind, "read", told))
        if method is not None:
            select = type(method).select

            def seen(self: Compressor, view: StageView) -> Selection | None:
                found.calls.append((view, select(self, view)))
                return found.calls[-1][1]

            hooks.enter_context(mock.patch.object(type(method), "select", seen))
            found.handle = hooks.enter_context(vtc.compress(model, method, **options))
        hook(stack.register_forward_hook(leave))
        for layer in stack.layers:  # behind the engine's own hooks, so that they see what the layer gets
            hook(layer.register_forward_pre_hook(enter, with_kwargs=True))
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]  # and whoever reads what it is given

        def replayed(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not found.states:
                given = recorded.get(id(module), Attention(query, key, kwargs["scaling"]))
                given = given if isinstance(given, Attention) else given(found.inputs[-1])
                if given.key.shape[2] == key.shape[2]:  # otherwise other tokens are here than were recorded
                    query, key, kwargs["scaling"] = given
                if id(module) in numbers:
                    found.attention[numbers[id(module)]] = given
            return attend(module, query, key, value, *args, **kwargs)

        hooks.enter_context(mock.patch.dict(ALL_ATTENTION_FUNCTIONS._local_mapping, {"sdpa": replayed}))
        cache = model(**inputs, use_cache=True).past_key_values
        found.keys = [layer.keys.clone() for layer in cache.layers]
        for _ in rows[1:]:
            step = torch.full_like(inputs["input_ids"][:, :1], 3)
            cache = model(input_ids=step, past_key_values=cache, use_cache=True).past_key_values
    return found


@contextlib.contextmanager
def watched(place: Any, name: str, instead: Callable[..., Any] | None = None) -> Iterator[list[Any]]:
    """The results of a function that a method calls by `place.name`; instead: what it calls in its place."""
    function, results = instead or getattr(place, name), list[Any]()

    def noted(*args: Any, **kwargs: Any) -> Any:
        results.append(function(*args, **kwargs))
        return results[-1]

    with mock.patch.object(place, name, noted):
        yield results


def again(method: Compressor, view: StageView, **budget: Any) -> Tensor:
    """[I, N] what a method keeps of a view that it was shown, under another budget."""
    answer = method.select(replace(view, budget=vtc.Budget(**budget)))
    assert answer is not None
    return answer.keep
