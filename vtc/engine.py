"""The engine: hooks that let one method act inside one unmodified model, and leave no trace.

Hooks sit on the model (labels), the backbone (which tokens are visual), the language model (cache, positions, masks,
the stage before the LLM), on decoder layers (stages inside the LLM) and on the feature methods (`vtc.vision`). Whatever
must outlive a call lies in the KV cache; the state of a call lives in `Call` and ends with it.
"""

from __future__ import annotations

import functools
import inspect
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask

from vtc.adapters.base import Adapter
from vtc.budget import Budget
from vtc.cache import CompressedCache, check_plain
from vtc.call import Call
from vtc.compressor import CacheStage, Compressor, EncoderStage, Plan, Positions, Rows, Selection, Stage, StageView
from vtc.encoder_stage import EncoderStages
from vtc.errors import UnsupportedCall, UnsupportedMethod, VTCError
from vtc.items import ItemTable, build
from vtc.layout import VisionContext
from vtc.ops.attention import attention_rows
from vtc.taps import AttentionCall, TapSet
from vtc.trace import CallRecord, CallStats, Stats
from vtc.vision import VisionRecorder, context_of

OWNER = "_vtc_engine"
MEDIA = ("pixel_values", "pixel_values_videos")


class _State(threading.local):
    """What one thread's current forward pass knows before the language model is reached."""

    labels: Tensor | None = None
    placeholders: Tensor | None = None
    contexts: tuple[VisionContext, ...] = ()
    call: Call | None = None
    seconds: float = 0.0


def _guarded(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Count the hook's host time and remember what it raised, for callers that swallow exceptions."""

    @functools.wraps(hook)
    def guarded(self: Engine, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return hook(self, *args, **kwargs)
        except Exception as error:
            self.errors.append(error)
            raise
        finally:
            self._state.seconds += time.perf_counter() - start

    return guarded


class Engine:
    """One method attached to one model. `attach` and `detach` are the whole life cycle."""

    def __init__(
        self,
        adapter: Adapter,
        method: Compressor,
        plan: Plan,
        budget: Budget | None,
        positions: Positions,
        *,
        pad_output: bool,
        trace: bool,
    ) -> None:
        self.adapter, self.method, self.plan, self.budget = adapter, method, plan, budget
        self.positions, self.pad_output, self.tracing = positions, pad_output, trace
        self.spec = adapter.spec
        self.stats, self.trace, self.errors = Stats(), list[CallRecord](), list[Exception]()
        self.inner = sorted(stage for stage in plan.stages if isinstance(stage, int))
        after = [stage for stage in plan.stages if isinstance(stage, CacheStage)]
        self.cache_stage = after[0] if after else None
        bounds = [*self.inner, *(stage.from_layer for stage in after)]
        self.starts = tuple(sorted({0, *bounds}))
        if bounds and not 0 <= max(bounds) < self.spec.llm_layers:
            raise UnsupportedMethod(
                f"{method.name!r} acts at LLM layer {max(bounds)}; this {self.spec.family} model has layers 0 to "
                f"{self.spec.llm_layers - 1}"
            )
        encoder = [stage for stage in plan.stages if isinstance(stage, EncoderStage)]
        stages = EncoderStages(adapter, method, encoder, budget) if encoder else None
        self.recorder = VisionRecorder(adapter, plan.needs.vision, stages)
        attention = adapter.llm_attention
        self.taps = TapSet((attention[k], functools.partial(self._tap, k, r)) for k, r in plan.needs.llm.items())
        self.placeholders = adapter.placeholders
        self._state = _State()
        self._handles: list[Any] = []

    # --- life cycle
    def attach(self) -> None:
        """Install all hooks. Raises VTCError when the model already carries an engine."""
        adapter = self.adapter
        if OWNER in adapter.model.__dict__:
            raise VTCError("this model already has a method attached; detach it first (leave its `with` block)")
        self.recorder.install()
        self.taps.install()
        adapter.model.__dict__[OWNER] = self
        handles = self._handles
        handles.append(adapter.model.register_forward_pre_hook(self._enter_model, with_kwargs=True))
        handles.append(adapter.backbone.register_forward_pre_hook(self._enter_backbone, with_kwargs=True))
        language_model = adapter.language_model
        handles.append(language_model.register_forward_pre_hook(self._enter_llm, with_kwargs=True))
        handles.append(language_model.register_forward_hook(self._leave_llm, with_kwargs=True, always_call=True))
        for index, layer in enumerate(adapter.layers):
            # FlashAttention reads gapped position ids as packed sequences: there they are withheld from every layer.
            if index >= min(self.starts[1:], default=len(adapter.layers)) or self._flash():
                hook = functools.partial(self._enter_layer, index)
                handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))

    def detach(self) -> None:
        """Remove everything; harmless when already detached."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            self.recorder.remove()
            self.taps.remove()
            del self.adapter.model.__dict__[OWNER]
        self._handles = []
        self._state = _State()

    # --- hooks
    @_guarded
    def _enter_model(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        labels = _arguments(module, args, kwargs).get("labels")
        if labels is not None and not self.pad_output:
            raise UnsupportedCall(
                "labels were given while visual tokens are removed, so logits and labels would not line up; "
                "attach with pad_output=True"
            )
        self._state.labels = labels

    @_guarded
    def _enter_backbone(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = self._state
        state.call, state.placeholders, state.contexts = None, None, ()
        self.recorder.contexts = []
        given = _arguments(module, args, kwargs)
        outputs = given.get("mm_encoder_outputs") or {}
        # Only a call that carries media holds visual tokens: a placeholder id the model generated is text.
        if not outputs and all(given.get(name) is None for name in MEDIA):
            return
        contexts = [context_of(output) for output in outputs.values() if output is not None]
        if any(context is None for context in contexts):
            raise UnsupportedCall(
                "mm_encoder_outputs were encoded without the attached method (or cut by chunked prefill); encode them "
                "inside the `with` block and pass them whole"
            )
        state.contexts = tuple(context for context in contexts if context is not None)
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        if ids is not None:
            state.placeholders = torch.stack([ids == token for token in self.placeholders.values()])
        elif embeds is not None:
            table = self.adapter.model.get_input_embeddings()
            tokens = [torch.tensor(token, device=embeds.device) for token in self.placeholders.values()]
            state.placeholders = torch.stack([(embeds == table(token)).all(-1) for token in tokens])

    @_guarded
    def _enter_llm(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache = kwargs.get("past_key_values")
        items, totals = self._items(kwargs)
        if items is None and not isinstance(cache, CompressedCache):
            self._note_plain(None)
            return None
        if items is not None and not isinstance(cache, CompressedCache) and self._identity(items):
            self._note_plain(items, kwargs["inputs_embeds"].shape[:2])
            return None
        hidden: Tensor = kwargs["inputs_embeds"]
        call = self._state.call = self._begin(hidden, kwargs, items, totals)
        if items is not None:
            hidden = self._drop_encoded(call, hidden)
            hidden = self._run(0, call, hidden)
        positions, mask = call.enter(0, hidden.device)
        if mask is None and call.cache is None:
            # Without cache and mask, gapped position ids would be taken for several packed sequences.
            mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        kwargs |= {"inputs_embeds": hidden, "position_ids": positions, "attention_mask": self._mask(mask, hidden)}
        if call.cache is not None:
            call.cache.seen += call.length
        return args, kwargs

    @_guarded
    def _enter_layer(self, index: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self._state.call
        if call is None:
            return None
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if index > 0 and index in self.starts:
            call.to(hidden.device)
            if call.items is not None:
                hidden = self._run(index, call, hidden)
            positions, mask = call.enter(index, hidden.device)
            config = self.adapter.language_model.config
            call.group_inputs = (
                create_causal_mask(
                    config=config,
                    inputs_embeds=hidden,
                    attention_mask=self._mask(mask, hidden),
                    past_key_values=call.cache,
                    position_ids=None,
                    layer_idx=index,
                ),
                self.adapter.language_model.rotary_emb(hidden, positions),
            )
        kwargs["position_ids"] = None  # rotary phases come from position_embeddings; ids only feed packing detection
        if call.group > 0:
            kwargs["attention_mask"], kwargs["position_embeddings"] = call.group_inputs
        if args:
            return (hidden, *args[1:]), kwargs
        kwargs["hidden_states"] = hidden
        return args, kwargs

    @_guarded
    def _leave_llm(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        state = self._state
        call, state.call = state.call, None
        if call is None:
            return None
        if call.cache is not None:
            call.cache.open = False
        if output is None:  # the forward pass raised
            return None
        if call.items is not None:
            if self.cache_stage is not None and call.cache is not None:
                self._evict(call, self.cache_stage, output.last_hidden_state)
            self._note(call)
        else:
            self._add(None)
        if self.pad_output and call.pruned:
            self._check_labels(call)
            output.last_hidden_state = _spread(call, output.last_hidden_state)
        return output

    # --- one call
    def _items(self, kwargs: dict[str, Any]) -> tuple[ItemTable | None, list[int]]:
        """The items of this call and the valid tokens of each row; one host synchronisation when there are items."""
        state = self._state
        contexts = state.contexts or tuple(self.recorder.contexts)
        state.contexts, self.recorder.contexts = contexts, []
        if state.placeholders is None:
            return None, []
        mask, hidden = _mask_2d(kwargs), kwargs["inputs_embeds"]
        batch, length = hidden.shape[:2]
        counts = state.placeholders.sum(-1).flatten()
        if mask is not None:
            counts = torch.cat([counts, mask[:, -length:].to(counts.device).bool().sum(1)])
        numbers: list[int] = counts.tolist()
        totals = numbers[-batch:] if mask is not None else [length] * batch
        visual = numbers[: len(self.placeholders) * batch]
        if not any(visual):
            return None, totals
        kinds = {kind: place for place, kind in enumerate(self.placeholders)}
        return build(state.placeholders, visual, contexts, kinds), totals

    def _identity(self, items: ItemTable) -> bool:
        """True when the budget keeps every token: then the model must stay untouched, bit for bit."""
        if any(context.alive is not None for context in self._state.contexts) or self.budget is None:
            return False
        return all(self.budget.tokens(count) >= count for count in items.input_counts)

    def _begin(self, hidden: Tensor, kwargs: dict[str, Any], items: ItemTable | None, totals: list[int]) -> Call:
        batch, length = hidden.shape[:2]
        mask, cache = _mask_2d(kwargs), kwargs.get("past_key_values")
        config = self.adapter.language_model.config
        use_cache = kwargs.get("use_cache")
        if cache is None and (config.use_cache if use_cache is None else use_cache):
            cache = kwargs["past_key_values"] = DynamicCache(config=config)
        past = None
        if cache is not None:
            if not isinstance(cache, CompressedCache):
                check_plain(cache)
                seen = cache.get_seq_length()
                past = mask[:, :seen].bool() if mask is not None and seen else None
            cache = CompressedCache.adopt(cache, self.starts, past)
            cache.open = True
        valid = mask[:, -length:].bool() if mask is not None and length > 1 else None
        if items is not None and all(total == length for total in totals):
            valid = None
        visual = None
        if items is not None:
            assert self._state.placeholders is not None
            visual = self._state.placeholders.any(0)
        logical = self._logical(kwargs.get("position_ids"), batch, length, cache, hidden.device)
        return Call(logical, valid, self.positions, cache, items, visual, totals, self.tracing)

    def _logical(self, ids: Tensor | None, batch: int, length: int, cache: Any, device: torch.device) -> Tensor:
        if ids is None:
            seen = cache.seen if cache is not None else 0
            ids = (torch.arange(length, device=device) + seen)[None]
        if ids.ndim == 3 and ids.shape[0] == 4:
            ids = ids[1:]  # the text row only feeds packed-sequence detection
        if self.spec.mrope and ids.ndim == 2:
            ids = ids[None].expand(3, -1, -1)
        return ids.expand(*ids.shape[:-2], batch, length)

    def _mask(self, mask: Tensor | None, hidden: Tensor) -> Tensor | None:
        """A 2D mask as the model takes it; for one new token under SDPA the finished 4D mask, which saves a sync."""
        if mask is None or hidden.shape[1] > 1 or self.adapter.language_model.config._attn_implementation != "sdpa":
            return mask
        return mask[:, None, None, :]

    def _flash(self) -> bool:
        return "flash" in (self.adapter.language_model.config._attn_implementation or "")

    # --- stages
    def _run(self, stage: int, call: Call, hidden: Tensor) -> Tensor:
        if stage not in self.inner:
            return hidden
        selection = self._select(stage, call, hidden)
        return hidden if selection is None else call.apply(stage, selection, hidden)

    def _select(self, stage: Stage, call: Call, hidden: Tensor) -> Selection | None:
        items, contexts = call.items, self._state.contexts
        assert items is not None and call.visual is not None
        source = torch.cat([context.fingerprint for context in contexts]).to(hidden.device)
        vision = {
            layer: _stack([context.attention[layer].to(hidden.device) for context in contexts])
            for layer in self.plan.needs.vision
        }
        view = StageView(
            stage=stage,
            model=self.spec,
            budget=self.budget,
            items=items,
            hidden=hidden,
            visual=call.visual,
            valid=call.valid_rows(),
            fingerprint=source[items.source],
            vision_rows=vision,
            llm_rows=call.llm_rows,
        )
        return self.method.select(view)

    def _drop_encoded(self, call: Call, hidden: Tensor) -> Tensor:
        """Remove the tokens whose patches an encoder stage dropped."""
        contexts, items = self._state.contexts, call.items
        if all(context.alive is None for context in contexts):
            return hidden
        assert items is not None
        full = [c.alive or (torch.ones_like(c.fingerprint, dtype=torch.bool)[:, None], ()) for c in contexts]
        counts = [n for c, (_, kept) in zip(contexts, full, strict=True) for n in kept or [i.n_tokens for i in c.items]]
        alive = _stack([part.to(hidden.device) for part, _ in full])[items.source].gather(1, items.token)
        sources = items.source.tolist()
        return call.apply(0, Selection(alive, counts=[counts[source] for source in sources]), hidden)

    def _tap(self, layer: int, rows: Rows, attention: AttentionCall) -> None:
        call = self._state.call
        if call is None or call.items is None:
            return
        if rows is not Rows.LAST:
            raise UnsupportedMethod(f"LLM taps record {Rows.LAST.value!r} rows, {rows.value!r} was asked for")
        valid = call.valid_rows()
        last = (torch.arange(call.rows, device=valid.device) * valid).amax(1, keepdim=True)
        mask = attention.mask
        if not isinstance(mask, Tensor):
            mask = call.valid if call.cache is None else call.cache.masks[call.group]
        query, key = attention.query, attention.key
        values = attention_rows(query, key, last, attention.scaling, mask=mask, causal=True)[:, 0]
        call.llm_rows[layer] = values[:, -call.rows :]

    def _evict(self, call: Call, stage: CacheStage, hidden: Tensor) -> None:
        cache, items = call.cache, call.items
        assert cache is not None and items is not None
        selection = self._select(stage, call, hidden)
        if selection is None:
            return
        survivors = items.scatter(selection.keep & items.mask, call.valid_rows())
        over_input = call.over_input(call.source, survivors)
        if call.record is not None:
            call.record.keep[stage] = over_input
        for group in self.starts:
            if group < stage.from_layer:
                continue
            source, valid = call.sources[group]
            chunk = over_input.gather(1, source)
            chunk = chunk if valid is None else chunk & valid
            old = cache.physical_length(group) - chunk.shape[1]
            cache.evict(group, torch.cat([chunk.new_ones(call.batch, old), chunk], dim=1))

    # --- notes
    def _note(self, call: Call) -> None:
        assert call.items is not None
        layers = self.spec.llm_layers
        ends = [start for start, _, _ in call.groups[1:]] + [layers]
        spans = [(end - start, rows, totals) for (start, rows, totals), end in zip(call.groups, ends, strict=True)]
        kept = tuple(sum(n * totals[row] for n, _, totals in spans) / layers for row in range(call.batch))
        before = [0] * call.batch
        for row, count in zip(call.items.rows, call.items.input_counts, strict=True):
            before[row] += count
        held = tuple(call.cache.physical_length(i) for i in range(layers)) if call.cache is not None else ()
        rows = tuple(rows for n, rows, _ in spans for _ in range(n))
        self._add(CallStats(call.batch, tuple(before), kept, tuple(call.stages), rows, held, self._state.seconds))
        if call.record is not None:
            self.trace.append(call.record)

    def _note_plain(self, items: ItemTable | None, shape: torch.Size | None = None) -> None:
        """A call the engine leaves alone: text only, a decode step, or a budget that keeps everything."""
        if items is None or shape is None:
            self._add(None)
            return
        totals = items.row_totals(shape[0])
        self._add(
            CallStats(
                shape[0], tuple(totals), tuple(map(float, totals)), (), (shape[1],) * self.spec.llm_layers, (),
                self._state.seconds,
            )
        )  # fmt: skip

    def _add(self, stats: CallStats | None) -> None:
        if stats is None:
            self.stats.other_calls += 1
        else:
            self.stats.calls.append(stats)
        self.stats.seconds += self._state.seconds
        self._state.seconds = 0.0

    def _check_labels(self, call: Call) -> None:
        labels = self._state.labels
        if labels is None:
            return
        alive = call.over_input(call.source, call.valid)
        if bool(((labels[:, 1:] != -100) & ~alive[:, :-1].to(labels.device)).any()):
            raise UnsupportedCall(
                "a label follows a removed visual token, so nothing predicts it; set labels that follow visual tokens "
                "to -100"
            )


def _arguments(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a forward call by name."""
    if not args:
        return kwargs
    bound = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
    return {**bound, **bound.get("kwargs", {})}


def _mask_2d(kwargs: dict[str, Any]) -> Tensor | None:
    mask = kwargs.get("attention_mask")
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return mask
    raise UnsupportedCall(
        "compression needs a 2D attention mask [batch, length]; custom 4D masks and static caches are not supported"
    )


def _stack(parts: list[Tensor]) -> Tensor:
    """[I_c, N_c] tables of several contexts as one [I, N], zero-padded."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])


def _spread(call: Call, hidden: Tensor) -> Tensor:
    """[B, L, D] output rows back at their input positions, [B, S, D]; zeros where a token was removed."""
    valid = call.valid_rows().to(hidden.device)
    place = torch.where(valid, call.source.to(hidden.device), call.length)
    full = hidden.new_zeros(call.batch, call.length + 1, hidden.shape[-1])
    row = torch.arange(call.batch, device=hidden.device)[:, None]
    return full.index_put((row, place), hidden)[:, :-1]
