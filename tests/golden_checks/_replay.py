"""Running a whole model on what a stored case recorded, so that a method meets the case's tensors and nothing else.

A model is built in the case's sizes and run through `vtc.compress` as a user would. On the way the recorded tensors take
the place of what the random weights compute: rows that enter a module, and the queries and keys of an attention layer.
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

    run: (description, given tensors) -> every other tensor. given: names or prefixes of what is given. corrected:
    (description, all tensors) -> values that replace stored ones, where the case's own arithmetic is at fault.
    """

    run: Callable[[dict[str, Any], dict[str, Tensor]], Outputs]
    given: tuple[str, ...]
    corrected: Callable[[dict[str, Any], dict[str, Tensor]], dict[str, Tensor]] = lambda case, tensors: {}

    def inputs(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The given ones among a case's tensors."""
        return {k: v for k, v in tensors.items() if k in self.given or k.startswith(self.given)}


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


def class_row(weights: Tensor) -> Attention:
    """A layer whose first row pays `weights` [crops, heads, T] (or their logarithms are its logits, up to a constant)."""
    return class_logits(weights.double().clamp(min=1e-30).log())


def class_logits(logits: Tensor) -> Attention:
    """A layer whose first row has these logits [crops, heads, T]; all other rows are even."""
    key = logits.float()[..., None]
    query = torch.zeros_like(key)
    query[..., 0, 0] = 1
    return Attention(query, key)


def even_rows(weights: Tensor) -> Attention:
    """A layer all of whose rows pay `weights` [crops, heads, T]."""
    logits = weights.double().clamp(min=1e-30).log()
    key = (logits - logits.mean(-1, keepdim=True)).float()[..., None]
    return Attention(torch.ones_like(key), key)


def matrix(weights: Tensor) -> Attention:
    """A layer with the attention `weights` [crops, heads, T, T]."""
    keys = torch.eye(weights.shape[-1]).expand_as(weights)
    return Attention(weights.double().clamp(min=1e-30).log().float(), keys)


# --- running
@dataclass
class Run:
    """What a prompt and its decode steps left behind.

    states: last hidden state (after the final norm) of every call, [B, rows, D]. inputs: rows that entered every LLM
    layer at the prefill, [B, rows, D]. keys: rotated keys of every layer after the prefill, [B, heads, rows, D].
    positions: of every call, what the rotary embedding was asked for, one tensor per group of layers. calls: (view,
    answer) of every stage. attention: LLM layer -> queries and keys of the prefill. items: trace of every item. alive: stage -> rows of the first prompt that are left, text too.
    """

    states: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    positions: list[list[Tensor]] = field(default_factory=list)
    calls: list[tuple[StageView, Selection | None]] = field(default_factory=list)
    attention: dict[int, Attention] = field(default_factory=dict)
    handle: vtc.Handle | None = None

    @property
    def items(self) -> list[Any]:
        return self.handle.trace[0].items if self.handle is not None else []

    @property
    def kept(self) -> dict[Stage, Tensor]:
        """Stage -> image tokens of the first item that passed it, in ascending order."""
        return self.items[0].kept if self.items else {}

    @property
    def alive(self) -> dict[Stage, Tensor]:
        keep = self.handle.trace[0].keep if self.handle is not None else {}
        return {stage: rows[0].nonzero().flatten() for stage, rows in keep.items()}

    @property
    def lengths(self) -> list[int]:
        """Rows in every layer's cache after the prefill."""
        return [each.shape[-2] for each in self.keys]

    def view(self, stage: Stage) -> StageView:
        return next(view for view, _ in self.calls if view.stage == stage)

    def answer(self, stage: Stage) -> Selection:
        found = next(answer for view, answer in self.calls if view.stage == stage)
        assert found is not None
        return found


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
    number: Callable[[int, int], int] | None = None,
    **options: Any,
) -> Run:
    """Prefill with `inputs`, then one decode step for every further entry of `rows`.

    rows: [B, L, D] what enters the LLM in place of the embeddings, for the prefill and for every step. entering: what
    enters a module in place of its own input. attention: queries and keys of an attention module, or a function of the
    rows [B, L, D] that entered its LLM layer. readings: kind of reading -> what is read of an LLM layer, from its number and those rows, in
    place of its own. number: (step, group of layers) -> position of a decoded token in place of
    the engine's. method: None runs the model alone. options: of `vtc.compress`.
    """
    stack, found = adapters.of(model).language_model, Run()
    recorded = {id(module): each for module, each in (attention or {}).items()}

    def feed(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        found.positions.append([])
        if rows:
            kwargs["inputs_embeds"] = rows[len(found.states)].to(kwargs["inputs_embeds"])
        return args, kwargs

    def enter(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if not found.states:
            found.inputs.append((args[0] if args else kwargs["hidden_states"]).clone())

    def ask(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Any:
        asked = args[1] if len(args) > 1 else kwargs["position_ids"]
        call = found.positions[-1]
        if number is not None and found.states:
            asked = torch.full_like(asked, number(len(found.states) - 1, len(call)))
        call.append(asked)
        return (args[0], asked), {}

    def leave(module: Any, args: Any, output: Any) -> None:
        found.states.append(output.last_hidden_state.clone())

    with contextlib.ExitStack() as hooks:

        def hook(handle: Any) -> None:
            hooks.callback(handle.remove)

        for module, given in (entering or {}).items():
            hook(module.register_forward_pre_hook(lambda module, args, given=given: (given.to(args[0]), *args[1:])))
        hook(stack.register_forward_pre_hook(feed, with_kwargs=True))
        hook(stack.rotary_emb.register_forward_pre_hook(ask, with_kwargs=True))
        for kind, read in (readings or {}).items():
            told = lambda *_, read=read: read(len(found.inputs) - 1, found.inputs[-1])  # noqa: E731
            hooks.enter_context(watched(kind, "read", told))
        if method is not None:
            hooks.enter_context(_seen(method, found.calls))
            found.handle = hooks.enter_context(vtc.compress(model, method, **options))
        hook(stack.register_forward_hook(leave))
        for layer in stack.layers:  # behind the engine's own hooks, so that they see what the layer gets
            hook(layer.register_forward_pre_hook(enter, with_kwargs=True))
        numbers = {id(layer.self_attn): number for number, layer in enumerate(stack.layers)}
        hooks.enter_context(_replaced(recorded, numbers, found))
        cache = model(**inputs, use_cache=True).past_key_values
        found.keys = [layer.keys.clone() for layer in cache.layers]
        for _ in rows[1:]:
            step = torch.full_like(inputs["input_ids"][:, :1], 3)
            cache = model(input_ids=step, past_key_values=cache, use_cache=True).past_key_values
    return found


@contextlib.contextmanager
def _seen(method: Compressor, calls: list[tuple[StageView, Selection | None]]) -> Iterator[None]:
    """Note what a method is shown and what it answers."""
    kind, original = type(method), type(method).select
    own = "select" in vars(kind)

    def select(self: Any, view: StageView) -> Selection | None:
        calls.append((view, answer := original(self, view)))
        return answer

    kind.select = select  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own:
            kind.select = original  # type: ignore[method-assign]
        else:
            del kind.select


@contextlib.contextmanager
def _replaced(recorded: Mapping[int, Any], numbers: Mapping[int, int], found: Run) -> Iterator[None]:
    """Hand recorded queries and keys to the attention function, in front of whoever reads them there."""
    below = ALL_ATTENTION_FUNCTIONS["sdpa"]
    local = "sdpa" in ALL_ATTENTION_FUNCTIONS._local_mapping

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = recorded.get(id(module))
        if given is not None and not found.states:
            given = given(found.inputs[-1]) if callable(given) else given
            if given.key.shape[2] == key.shape[2]:  # otherwise other tokens are here than were recorded
                query, key, kwargs["scaling"] = given
        if id(module) in numbers and not found.states:
            found.attention[numbers[id(module)]] = Attention(query, key, kwargs["scaling"])
        return below(module, query, key, value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        if local:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = below
        else:
            del ALL_ATTENTION_FUNCTIONS["sdpa"]


@contextlib.contextmanager
def watched(place: Any, name: str, instead: Callable[..., Any] | None = None) -> Iterator[list[Any]]:
    """The results of a function that a method calls by `place.name`; instead: what it calls in its place."""
    original, results = getattr(place, name), list[Any]()

    def function(*args: Any, **kwargs: Any) -> Any:
        results.append((instead or original)(*args, **kwargs))
        return results[-1]

    setattr(place, name, function)
    try:
        yield results
    finally:
        setattr(place, name, original)


def again(method: Compressor, view: StageView, **budget: Any) -> Selection:
    """What a method answers to a view it was shown, under another budget."""
    answer = method.select(replace(view, budget=vtc.Budget(**budget)))
    assert answer is not None
    return answer


def order(method: Compressor, view: StageView, steps: int) -> Tensor:
    """The order in which a greedy method picks its first `steps` tokens of the first item, from growing budgets."""
    seen, picked = torch.zeros(view.items.mask.shape[1], dtype=torch.bool), []
    for keep in range(1, steps + 1):
        answer = again(method, view, keep=keep)
        new = answer.keep[0] & ~seen
        assert int(new.sum()) == 1 and bool(answer.keep[0][seen].all()), "a larger budget keeps what a smaller one does"
        picked.append(int(new.nonzero()))
        seen |= new
    return torch.tensor(picked)
