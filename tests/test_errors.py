"""Every message says what was given, why it is refused and what to write; every `raise` of the core is covered."""

from __future__ import annotations

import ast
import inspect
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    StaticCache,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

import vtc
import vtc.errors
from vtc import adapters
from vtc.batch.context import VisionContext
from vtc.batch.items import build
from vtc.engine.cache import CompressedCache
from vtc.errors import (
    BudgetError,
    InputError,
    UnknownName,
    UnsupportedCall,
    UnsupportedMethod,
    UnsupportedModel,
    VTCError,
    unknown_name,
)
from vtc.method.base import (
    AFTER_PREFILL,
    Compressor,
    EncoderStage,
    ModelSpec,
    Needs,
    Plan,
    Rows,
    ScoringCompressor,
    Selection,
    Stage,
    StageView,
)
from vtc.method.budget import Budget
from vtc.method.composite import Composite
from vtc.method.layout import VisualItem
from vtc.method.registry import MethodRegistry
from vtc.testing import FixedKeep, LastRowTopK, tiny_inputs, tiny_model
from vtc.testing.pairs import tiny_pair

CORE = {
    "batch": ("items", "prompt"),
    "engine": ("arguments", "attach", "cache", "encoder", "encoder_stages", "engine", "inputs"),
    "method": ("base", "budget", "composite", "registry"),
}
CORE["engine"] += ("eviction", "llm_pass", "masks", "pairs", "stages", "taps")
HOME = Path(vtc.__file__).parent
NAME = "llava-clip"
PAIR = [[3, "image", 5], [2, "image", 9]]
INNER = FixedKeep(at=(2,))


@dataclass(frozen=True)
class Probe(Compressor):
    """Acts and reads where it is told, keeps everything."""

    at: tuple[Stage, ...] = (0,)
    needs: Needs = field(default_factory=Needs)

    name: ClassVar[str] = "probe"

    @property
    def needs_budget(self) -> bool:
        return False

    def plan(self, model: ModelSpec) -> Plan:
        return Plan(self.at, self.needs, "preserve")

    def select(self, view: StageView) -> Selection | None:
        return None


@dataclass(frozen=True)
class Ragged(Probe):
    """Keeps one patch more in every further crop."""

    def select(self, view: StageView) -> Selection | None:
        return Selection(view.items.token <= torch.arange(len(view.items))[:, None])


@dataclass(frozen=True)
class Soft(Probe):
    """Keeps everything, half as visible."""

    def select(self, view: StageView) -> Selection | None:
        return Selection(view.items.mask, view.items.counts, weights=torch.full(view.items.mask.shape, 0.5))


@dataclass(frozen=True)
class SoftSkip(Soft):
    """The same of tokens that skip a layer."""

    def plan(self, model: ModelSpec) -> Plan:
        return Plan(self.at, self.needs, "preserve", skips=self.at)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Weighed(Probe):
    """Gains where no token skips a layer."""

    def select(self, view: StageView) -> Selection | None:
        return Selection(view.items.mask, view.items.counts, gains=torch.ones(view.items.mask.shape))


@dataclass(frozen=True)
class Half(Probe):
    """Keeps every other patch."""

    def select(self, view: StageView) -> Selection | None:
        return Selection(view.items.token % 2 == 0)


@dataclass(frozen=True)
class Heads(Probe):
    """Names a set for each of `heads` heads, everything but `lacking` entries of the first."""

    heads: int = 2
    lacking: int = 0

    def select(self, view: StageView) -> Selection | None:
        keep = view.items.mask[:, None].repeat(1, self.heads, 1)
        keep[:, 0, : self.lacking] = False
        return Selection(keep)


@dataclass(frozen=True)
class Entries(Probe):
    """Puts empty entries in the place of those of the cache."""

    def select(self, view: StageView) -> Selection | None:
        none = torch.zeros(*view.items.mask.shape[:1], 2, view.items.mask.shape[1], 16)
        return Selection(view.items.mask, entries=(none, none))


@dataclass(frozen=True)
class Chooser(ScoringCompressor):
    name: ClassVar[str] = "chooser"

    def score(self, view: StageView) -> torch.Tensor:
        return view.items.token.float()


class Undecorated(Compressor):
    layers: list[int] = [2, 6]  # noqa: RUF012

    def select(self, view: StageView) -> Selection | None:
        return None


def model(**options: Any) -> Any:
    return tiny_model(NAME, **options)


def run(method: Any, change: Callable[[Any, dict[str, Any]], Any] | None = None, **options: Any) -> None:
    """Attach, let `change` alter model or inputs, and call."""
    subject, inputs = model(), dict(tiny_inputs(NAME, PAIR))
    with vtc.compress(subject, method, **options), torch.no_grad():
        manager = change(subject, inputs) if change is not None else None
        with manager or nullcontext():
            subject(**inputs)


def compressed_cache() -> CompressedCache:
    subject = model()
    with vtc.compress(subject, FixedKeep()), torch.no_grad():
        cache = subject(**tiny_inputs(NAME, PAIR), use_cache=True).past_key_values
    return cache  # type: ignore[no-any-return]


def decode(subject: Any, cache: Any) -> None:
    subject(input_ids=torch.tensor([[7], [7]]), past_key_values=cache, use_cache=True)


def continue_with(method: Any, cache: Any) -> None:
    subject = model()
    with vtc.compress(subject, method):
        decode(subject, cache)


def other_settings() -> None:
    continue_with(FixedKeep(rate=0.25), compressed_cache())


def interrupted_cache() -> CompressedCache:
    cache = compressed_cache()
    cache.begin()
    cache.interrupt()
    return cache


def checkpointed_decode() -> None:
    cache, subject = compressed_cache(), model().train()
    for layer in subject.model.language_model.layers:
        layer.gradient_checkpointing = True
    with vtc.compress(subject, FixedKeep()):
        decode(subject, cache)


def checkpointed_learning() -> None:
    subject = model().train()
    for layer in subject.model.language_model.layers:
        layer.gradient_checkpointing = True
    with vtc.compress(subject, "atp", training=True):
        subject(**tiny_inputs(NAME, PAIR))


def attentions() -> None:
    subject = model(attn_implementation="eager")
    with vtc.compress(subject, FixedKeep(), pad_output=True):
        subject(**tiny_inputs(NAME, PAIR), output_attentions=True)


def compile_backbone(subject: Any) -> None:
    subject.model.forward = torch.compile(subject.model.forward, backend="eager")


def sliding() -> Any:
    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = MistralConfig(sliding_window=8, vocab_size=128, num_key_value_heads=2, **size)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=CLIPVisionConfig(**size), text_config=text, image_token_index=120)
    )


def compiled(change: Callable[[Any], Any]) -> Any:
    subject = model()
    return change(subject) or subject


def table(rows: list[int], tokens: list[int], kinds: Any = None, contexts: bool = True) -> None:
    """Build the item table of a batch with so many placeholders per row, for items of so many tokens."""
    item = lambda n: VisualItem(  # noqa: E731
        "image", n, torch.zeros(n).long(), torch.zeros(n), torch.zeros(n), torch.zeros(n).bool(), 1, (1, n)
    )
    marks = torch.arange(max(rows)) < torch.tensor(rows)[:, None]
    context = VisionContext("image", [item(n) for n in tokens], torch.zeros(len(tokens)).long(), lambda v: [])
    build(marks[None], rows, [context] if contexts else [], {"image": 0})


def outside(subject: Any, inputs: dict[str, Any]) -> None:
    """Replace the pixels by features that were encoded before."""
    pixels = inputs.pop("pixel_values")
    with torch.no_grad():
        inputs["mm_encoder_outputs"] = {"image": model().model.get_image_features(pixels, return_dict=True)}


def labelled(subject: Any, inputs: dict[str, Any]) -> None:
    visual = inputs["input_ids"] == subject.config.image_token_id
    inputs["labels"] = inputs["input_ids"].masked_fill(visual, -100)


def labelled_pictures(subject: Any, inputs: dict[str, Any]) -> None:
    inputs["labels"] = inputs["input_ids"]


def unread() -> None:
    """A method that reads what its plan does not name."""

    @dataclass(frozen=True)
    class Asks(Probe):
        def select(self, view: StageView) -> Selection:
            return Selection(view.llm_attention(1, Rows.LAST) > 0)

    run(Asks((2,)))


def router_statistics() -> None:
    """A mixture of experts asked for its load-balancing loss."""
    subject = tiny_model("qwen3-vl-moe")
    with vtc.compress(subject, FixedKeep()), torch.no_grad():
        subject(**tiny_inputs("qwen3-vl-moe", PAIR, model=subject), output_router_logits=True)


def without_registry() -> None:
    """An attention module that calls its function directly."""
    subject = model()
    attention = adapters.of(subject).llm_attention[2]
    attention.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with vtc.compress(subject, "pyramiddrop", layers=(2,), retention=0.7), torch.no_grad():
        subject(**tiny_inputs(NAME, PAIR))


def four_dimensions(subject: Any, inputs: dict[str, Any]) -> None:
    length = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.ones(2, 1, length, length).tril().bool()


def static_cache(subject: Any, inputs: dict[str, Any]) -> None:
    inputs["past_key_values"] = StaticCache(config=subject.config.get_text_config(), max_cache_len=64)


def without_tower() -> None:
    """An encoder whose layers do not run: its features come from elsewhere."""
    subject = model()
    features = [torch.zeros(16, 64)] * 2
    subject.model.get_image_features = lambda pixel_values, **kwargs: BaseModelOutputWithPooling(pooler_output=features)
    with vtc.compress(subject, "vtc_cls", retention=0.5):
        subject(**tiny_inputs(NAME, PAIR))


def shared(methods: list[Any], attached: Any) -> None:
    subject = model()
    with vtc.share_encoder(subject, methods), vtc.compress(subject, attached, retention=0.5), torch.no_grad():
        subject(**tiny_inputs(NAME, PAIR))


def encode(name: str, kind: Any, seeds: int = 1, *, odd: bool = False, method: Any = None) -> None:
    """Drop patches inside the encoder of a family whose packing may resize their map, `odd` of an odd side."""
    subject = tiny_model(name)
    for seed in range(seeds):
        inputs = tiny_inputs(name, [[3, kind, 4]], seed=seed, model=subject)
        if odd:
            subject.config.vision_config.patch_size = subject.config.vision_config.image_size // 3
        with vtc.compress(subject, method or Half((EncoderStage(1),))), torch.no_grad():
            subject(**inputs)


def overlapping() -> Any:
    subject = model()
    projection = adapters.of(subject).patch_projection
    assert projection is not None
    projection.stride = (1, 1)
    return subject


def several_layers() -> Any:
    subject = model()
    subject.config.vision_feature_layer = [1, 2]
    return subject


def flex_tower(subject: Any, inputs: dict[str, Any]) -> None:
    def switch(module: Any, args: Any, kwargs: Any) -> None:
        subject.model.vision_tower.config._attn_implementation = "flex_attention"

    layer = adapters.of(subject).vision_layers[1]
    layer.register_forward_pre_hook(switch, with_kwargs=True, prepend=True)


def flex_llm(subject: Any, inputs: dict[str, Any]) -> None:
    def switch(module: Any, args: Any, kwargs: Any) -> None:
        subject.model.language_model.config._attn_implementation = "flex_attention"

    inputs["use_cache"] = False
    layer = adapters.of(subject).layers[2]
    layer.register_forward_pre_hook(switch, with_kwargs=True, prepend=True)


def flash_llm(subject: Any, inputs: dict[str, Any]) -> None:
    def switch(module: Any, args: Any, kwargs: Any) -> None:
        subject.model.language_model.config._attn_implementation_internal = "flash_attention_2"

    subject.model.language_model.register_forward_pre_hook(switch, with_kwargs=True, prepend=True)


def second_attach() -> None:
    subject = model()
    with vtc.compress(subject, FixedKeep()):
        vtc.compress(subject, FixedKeep())


def reopened() -> None:
    handle = vtc.compress(model(), FixedKeep())
    handle.detach()
    with handle:
        pass


def other_stages() -> None:
    with vtc.compress(subject := model(), FixedKeep(at=(0, 2))), torch.no_grad():
        decode(subject, compressed_cache())


def registered_twice() -> None:
    registry = MethodRegistry()
    registry.register(Probe)
    registry.register(dataclass(frozen=True)(type("Other", (Ragged,), {"name": "probe"})))


def without_default() -> None:
    @dataclass(frozen=True)
    class Whole(Half):
        share: float = field(kw_only=True)
        name: ClassVar[str] = "whole"

    registry = MethodRegistry()
    registry.register(Whole)
    registry.create("whole")


def broken_package() -> None:
    class Point:
        value = "package:Method"

        def load(self) -> Any:
            raise ImportError("no module named package")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vtc.method.registry.entry_points", lambda group: [Point()])
        MethodRegistry().names()


class Sized(FixedKeep):
    """Says how much tokens count where nothing reads it."""

    def select(self, view: StageView) -> Selection:
        return replace(super().select(view), sizes=torch.ones(view.items.mask.shape))


def encoder() -> Any:
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    return CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8)).eval()


@dataclass(frozen=True)
class Case:
    """A mistake, its error, and fragments that say what was given, why it is refused and what to write."""

    trigger: Callable[[], Any]
    error: type[VTCError]
    given: str
    why: str
    write: str


CASES: dict[str, Case] = {
    # arguments
    "swapped": Case(
        lambda: vtc.compress("vtc_cls", model(), keep=4),  # type: ignore[arg-type]
        VTCError, "'vtc_cls' stands where the model belongs", "a LlavaFor", "write vtc.compress(model, 'vtc_cls'",
    ),
    "model class instead of a model": Case(
        lambda: vtc.compress(LlavaForConditionalGeneration, "vtc_cls", keep=4),  # type: ignore[arg-type]
        UnsupportedModel, "LlavaForConditionalGeneration", "is a class, no model", ".from_pretrained(...)",
    ),
    "no model": Case(
        lambda: vtc.compress([1], "vtc_cls", keep=4),  # type: ignore[arg-type]
        UnsupportedModel, "[1]", "is a list, no model", "pass what from_pretrained(...)",
    ),
    "no weights": Case(
        lambda: vtc.compress(model().to("meta"), "vtc_cls", keep=4),
        UnsupportedModel, "LlavaForConditionalGeneration", "are on the meta device", "load them with from_pretrained",
    ),
    "slip of an argument": Case(
        lambda: vtc.compress(model(), FixedKeep(), trase=False),
        UnknownName, "'trase'", "unknown argument", "did you mean 'trace'",
    ),
    "slip of an argument beside a name": Case(
        lambda: vtc.compress(model(), "vtc_cls", retension=0.5),
        UnknownName, "'retension'", "unknown hyper-parameter of 'vtc_cls'", "did you mean 'retention'",
    ),
    "names to share an encoder": Case(
        lambda: vtc.share_encoder(model(), ["vtc_cls"]),  # type: ignore[list-item]
        VTCError, "methods=['vtc_cls']", "no method", "write [vtc.create('vtc_cls')]",
    ),
    # attach
    "no method": Case(
        lambda: vtc.compress(model(), 3, keep=4),  # type: ignore[arg-type]
        VTCError, "method=3", "neither a registered name nor a Compressor", "write for example 'vtc_cls'",
    ),
    "parameters beside an object": Case(
        lambda: vtc.compress(model(), vtc.create("vtc_cls"), keep=4, layers=2),
        VTCError, "layers given beside a finished 'vtc_cls'", "beside a finished", "set it when building the object",
    ),
    "budget for nothing": Case(
        lambda: vtc.compress(model(), FixedKeep(), retention=0.5),
        BudgetError, "'fixed_keep'", "takes no retention or keep", "its hyper-parameters decide",
    ),
    "positions": Case(
        lambda: vtc.compress(model(), FixedKeep(), positions="compat"),  # type: ignore[arg-type]
        UnknownName, "'compat'", "unknown positions", "did you mean 'compact'",
    ),
    "detached handle": Case(
        reopened,
        VTCError, "this handle was detached", "its block would compress nothing", "call vtc.compress again",
    ),
    # budget
    "no budget": Case(
        lambda: vtc.compress(model(), "vtc_cls"),
        BudgetError, "neither of retention and keep", "pass exactly one", "retention=0.25 or keep=64",
    ),
    "retention": Case(
        lambda: vtc.compress(model(), "vtc_cls", retention=25),
        BudgetError, "retention=25", "outside (0, 1]", "for example 0.25 (use keep=N",
    ),
    "keep": Case(
        lambda: vtc.compress(model(), "vtc_cls", keep=0.25),  # type: ignore[arg-type]
        BudgetError, "keep=0.25", "not a positive whole number", "for example keep=64",
    ),
    "budgets of several items in two words": Case(
        lambda: vtc.compress(model(), "vtc_cls", keep=[4, 8], retention=[0.5, 0.5]),
        BudgetError, "retention=[0.5, 0.5] and keep=[4, 8]", "are no budgets of several items", "pass one list",
    ),
    "budgets of other items": Case(
        lambda: run("vtc_cls", keep=[4, 8, 9]),
        BudgetError, "3 budgets for 2 images and videos", "of this call", "give one for each of them",
    ),
    "budgets of items inside the encoder": Case(
        lambda: vtc.compress(model(), "tome", keep=[4, 8], inside=True),
        BudgetError, "2 budgets for 'tome'", "inside the encoder here, where all pictures share one", "one number",
    ),
    "layers in front of the first stage": Case(
        lambda: vtc.compress(model(), LastRowTopK(layer=3), retention=0.75),
        BudgetError, "retention=0.75", "3 of 4 LLM layers see every token", "ask for more than 0.750, prune earlier",
    ),
    "mean over layers": Case(
        lambda: run(LastRowTopK(layer=3), keep=8),
        BudgetError, "a mean of 8 of 16", "3 of 4 LLM layers see 16 tokens", "ask for at least 13 tokens",
    ),
    # cache
    "other stages": Case(
        other_stages,
        UnsupportedCall, "compressed at layers (0,)", "acts at (0, 2)", "continue it with the same method",
    ),
    "closed cache": Case(
        lambda: decode(model(), compressed_cache()),
        UnsupportedCall, "this KV cache", "filled with compressed visual tokens", "attach the same method again",
    ),
    "crop": Case(
        lambda: compressed_cache().crop(7),
        UnsupportedCall, "crop(7)", "on a compressed cache", "pass a negative count",
    ),
    "static cache": Case(
        lambda: run(FixedKeep(), static_cache),
        UnsupportedCall, "got StaticCache", "needs a plain DynamicCache", "drop cache_implementation",
    ),
    "another maker": Case(
        other_settings,
        UnsupportedCall, "filled by FixedKeep(at=(0,), rate=0.5", "the attached method is", "start a new cache",
    ),
    "interrupted cache": Case(
        lambda: decode(model(), interrupted_cache()),
        UnsupportedCall, "this KV cache was interrupted", "may hold different tokens", "start a new cache",
    ),
    "interrupted cache, attached": Case(
        lambda: continue_with(FixedKeep(), interrupted_cache()),
        UnsupportedCall, "this KV cache was interrupted", "may hold different tokens", "start a new cache",
    ),
    "filled cache under checkpointing": Case(
        checkpointed_decode,
        UnsupportedCall, "the KV cache that was passed", "its tokens would be missing", "pass no past_key_values",
    ),
    "attentions": Case(
        attentions,
        UnsupportedCall, "output_attentions=True", "among kept tokens only", "attach without pad_output",
    ),
    "learning under checkpointing": Case(
        checkpointed_learning,
        UnsupportedCall, "'atp'", "recomputes these without it", "gradient_checkpointing_disable()",
    ),
    # compiled
    "compiled backbone": Case(
        lambda: vtc.compress(compiled(compile_backbone), INNER),
        UnsupportedModel, "the forward method of LlavaModel", "and with it the hooks", "layer.forward = torch.compile",
    ),
    "compiled layer": Case(
        lambda: vtc.compress(compiled(lambda m: m.model.language_model.layers[2].compile(backend="eager")), INNER),
        UnsupportedModel, "LlamaDecoderLayer", "compiles the hooks", "layer.forward = torch.compile(layer.forward",
    ),
    "compiled model": Case(
        lambda: vtc.compress(torch.compile(model(), backend="eager"), FixedKeep()),
        UnsupportedModel, "torch.compile(model)", "compiles the hooks", "compile the forward method of every LLM layer",
    ),
    # compressor
    "scope": Case(
        lambda: Chooser(scope="items"),  # type: ignore[arg-type]
        UnknownName, "'items'", "unknown scope", "did you mean 'item'",
    ),
    "field without a default": Case(
        without_default,
        VTCError, "'whole'", "has no default for share", "write for example vtc.create('whole', share=...)",
    ),
    # encoder stages
    "patches beside an encoder stage": Case(
        lambda: vtc.compress(tiny_model("llava-onevision"), Probe((EncoderStage(1), 0), Needs(unpooled=True))),
        UnsupportedMethod, "projector of this llava-onevision model", "beside a method that removes", "attach one of",
    ),
    "several feature layers": Case(
        lambda: vtc.compress(several_layers(), Probe((EncoderStage(1),))),
        UnsupportedMethod, "'probe'", "several layers or of an inner one", "Choose a method that acts before or inside",
    ),
    "frames whose tokens share patches": Case(
        lambda: encode("llava-onevision", "video", odd=True),
        UnsupportedMethod, "each video token", "its neighbours share", "Choose a method that acts before or inside",
    ),
    "image that the packing shrinks": Case(
        lambda: encode("llava-onevision", "image", seeds=8),
        UnsupportedMethod, "each image token", "its neighbours share", "or pass smaller images",
    ),
    "sizes in a packed encoder": Case(
        lambda: encode("qwen2-vl", "image", method=Sized((EncoderStage(1),))),
        UnsupportedMethod, "'fixed_keep'", "takes none", "proportional=False",
    ),
    "proportional in a packed encoder": Case(
        lambda: vtc.compress(tiny_model("qwen2-vl"), "tome", inside=True, retention=0.5),
        UnsupportedMethod, "inside=True", "without a mask", "pass proportional=False",
    ),
    "attention in windows": Case(
        lambda: vtc.compress(tiny_model("qwen2.5-vl"), "zero_tprune", retention=0.7),
        UnsupportedMethod, "'zero_tprune'", "limits to windows in blocks [0, 2]", "take those behind blocks of whole",
    ),
    "encoder layer": Case(
        lambda: vtc.compress(model(), Probe((EncoderStage(4),))),
        UnsupportedMethod, "before layer 4", "leave layer 2", "only stages 0 to that layer",
    ),
    "ragged crops": Case(
        lambda: run(Ragged((EncoderStage(1),)), flex_tower),
        UnsupportedMethod, "'flex_attention'", "needs a mask inside the encoder", "attn_implementation='sdpa'",
    ),
    "sizes inside the LLM": Case(
        lambda: run(Sized()),
        UnsupportedCall, "sizes of tokens were given at stage 0", "encoder stages alone read", "leave them out there",
    ),
    "heads before the LLM": Case(
        lambda: run(Heads()),
        UnsupportedCall, "kept sets of KV heads were given at stage 0", "after the prefill alone", "leave them out",
    ),
    "more heads than the cache": Case(
        lambda: run(Heads((AFTER_PREFILL,), heads=4)),
        UnsupportedMethod, "sets for 4 heads", "from 0 on have 2 KV heads", "give a set for each of them, [I, H, N]",
    ),
    "heads that keep more": Case(
        lambda: run(Heads((AFTER_PREFILL,), lacking=1)),
        UnsupportedMethod, "more entries in some KV heads", "a cache holds as many for each", "mark as many in all",
    ),
    "entries before the LLM": Case(
        lambda: run(Entries()),
        UnsupportedCall, "cache entries were given at stage 0", "after the prefill alone", "leave them out there",
    ),
    "entries of several layers": Case(
        lambda: run(Entries((AFTER_PREFILL,))),
        UnsupportedMethod, "caches of 4 layers from 0 on", "hold different ones", "plan a CacheStage for every layer",
    ),
    "pixels of overlapping patches": Case(
        lambda: vtc.compress(overlapping(), Probe(needs=Needs({-1: Rows.PIXELS}))),
        UnsupportedMethod, "pixels of patches were asked for", "is not given pictures", "choose a method that reads",
    ),
    "pixels of a layer": Case(
        lambda: vtc.compress(model(), Probe(needs=Needs({1: Rows.PIXELS}))),
        UnsupportedMethod, "'pixels' was asked for of vision layer 1", "in front of the layers", "write Needs({-1:",
    ),
    "an LLM's argument for an encoder": Case(
        lambda: vtc.compress(encoder(), "tome", inside=True, keep=4, prompt_length=3),
        VTCError, "prompt_length given for a CLIPVisionModel", "has no LLM behind its encoder", "leave it out",
    ),
    # engine
    "second method": Case(
        second_attach,
        VTCError, "this model", "already has a method attached", "detach it first (leave its `with` block)",
    ),
    "labels": Case(
        lambda: run(FixedKeep(), labelled),
        UnsupportedCall, "labels were given", "would not line up", "attach with pad_output=True",
    ),
    # inputs
    "features from outside": Case(
        lambda: run(FixedKeep(), outside),
        UnsupportedCall, "mm_encoder_outputs", "encoded without the attached", "encode them inside the `with` block",
    ),
    "mask": Case(
        lambda: run(FixedKeep(), four_dimensions),
        UnsupportedCall, "custom 4D masks", "are not supported", "needs a 2D attention mask [batch, length]",
    ),
    "router statistics": Case(
        router_statistics,
        UnsupportedCall, "output_router_logits=True", "weighs by the attention mask", "pass output_router_logits=False",
    ),
    # items
    "no pixels": Case(
        lambda: table([4], [4], contexts=False),
        UnsupportedCall, "image placeholders", "no image was encoded", "pass its pixels too",
    ),
    "counts": Case(
        lambda: table([6], [4]),
        UnsupportedCall, "6 image placeholders", "cannot be matched to 4", "the whole prompt with all its pixels",
    ),
    "unequal rows": Case(
        lambda: table([4, 12], [4, 4]),
        UnsupportedCall, "rows 0 to 1", "share encoded items but hold [4, 12]", "repeat every prompt unchanged",
    ),
    "cut item": Case(
        lambda: table([2, 6], [4, 4]),
        UnsupportedCall, "row 0 holds 2 image placeholders", "ends inside an item of 4", "in the same order",
    ),
    # outputs
    "label behind a removed token": Case(
        lambda: run(FixedKeep(), labelled, pad_output=True),
        UnsupportedCall, "a label follows a removed token", "nothing predicts it", "set labels of padding",
    ),
    # prompt
    "no length": Case(
        lambda: vtc.compress(model(), "random", keep=4, prompt_length=0),
        InputError, "prompt_length=0", "is no number of tokens", "prompt_length=[17, 23]",
    ),
    "a size for every picture": Case(
        lambda: vtc.compress(model(), "random", keep=4, image_sizes=[480, 640]),  # type: ignore[list-item]
        InputError, "image_sizes=[480, 640]", "are no sizes of pictures", "image_sizes=[(480, 640)]",
    ),
    "no questions": Case(
        lambda: vtc.compress(model(), "random", keep=4, questions=[3]),  # type: ignore[list-item]
        InputError, "questions=[3]", "are no texts", 'questions=["What color is it?"]',
    ),
    # pairs
    "no pair": Case(
        lambda: vtc.compress(model(), "trim", keep=4),
        VTCError, "'trim' compares patches", "pair does not name it", "pair='ViT-L-14-336:openai'",
    ),
    "another tower": Case(
        lambda: vtc.compress(model(), "trim", keep=4, pair="tiny-clip"),
        UnsupportedMethod, "pair='tiny-clip'", "a vision tower of 6 layers", "give the CLIP from which it was taken",
    ),
    "another tower of its sizes": Case(
        lambda: vtc.compress(tiny_model(NAME, seed=9), "trim", keep=4, pair=tiny_pair(NAME)),
        UnsupportedMethod, "pair=", "with other weights (cosine", "give the CLIP from which it was taken",
    ),
    "no text": Case(
        lambda: run(vtc.create("trim", pair=tiny_pair(NAME)), keep=4),
        UnsupportedCall, "pair=", "whose text is not known", "set handle.questions",
    ),
    "questions of another batch": Case(
        lambda: run(vtc.create("trim", pair=tiny_pair(NAME)), keep=4, questions=["a"] * 3),
        UnsupportedCall, "questions has 3 entries", "for a batch of 2 rows", "give one text for all rows",
    ),
    "lengths of another batch": Case(
        lambda: run(FixedKeep(), prompt_length=[8, 8, 8]),
        UnsupportedCall, "prompt_length has 3 entries", "for a batch of 2 rows", "give one number for all rows",
    ),
    "pictures that are answers": Case(
        lambda: run(FixedKeep(), labelled_pictures, pad_output=True),
        UnsupportedCall, "16 visual tokens", "lie outside the prompt", "set the labels of visual tokens to -100",
    ),
    "ahead of no stage": Case(
        lambda: run(Probe((1,), Needs(llm={2: Rows.LAST_AHEAD}))),
        UnsupportedMethod, "'last, own projections' of LLM layer 2", "which 'probe' does not have", "add the stage",
    ),
    "not recorded": Case(
        unread,
        UnsupportedMethod, "'last' of LLM layer 1", "was not recorded", "name it in the Needs",
    ),
    "no attention function": Case(
        without_registry,
        UnsupportedModel, "LlamaAttention ran without", "queries and keys cannot be read", "attn_implementation='sdpa'",
    ),
    # registry
    "no method class": Case(
        lambda: MethodRegistry().register(nn.Linear),  # type: ignore[arg-type]
        VTCError, "Linear", "is no class of methods", "derive one from vtc.Compressor",
    ),
    "no name": Case(
        lambda: MethodRegistry().register(dataclass(frozen=True)(type("Odd", (Probe,), {"name": "a, b"}))),
        VTCError, "name='a, b'", "Odd has", "write a class variable such as name: ClassVar[str]",
    ),
    "abstract": Case(
        lambda: MethodRegistry().register(dataclass(frozen=True)(type("Half", (ScoringCompressor,), {"name": "half"}))),
        VTCError, "Half", "is abstract", "write its score",
    ),
    "name taken": Case(
        registered_twice,
        VTCError, "method name 'probe'", "is taken by", "choose another",
    ),
    "no dataclass": Case(
        lambda: MethodRegistry().register(Undecorated),
        VTCError, "Undecorated cannot become a dataclass", "mutable default", "fields with defaults that do not change",
    ),
    "method name": Case(
        lambda: vtc.create("vtc-cls"),
        UnknownName, "'vtc-cls'", "unknown method", "did you mean 'vtc_cls'",
    ),
    "hyper-parameter": Case(
        lambda: vtc.create("vtc_cls", layer=3),
        UnknownName, "'layer'", "unknown hyper-parameter of 'vtc_cls'", "did you mean 'layers'",
    ),
    "broken package": Case(
        broken_package,
        VTCError, "'package:Method'", "cannot be loaded (no module named package)", "fix or uninstall the package",
    ),
    # stages
    "LLM layer": Case(
        lambda: vtc.compress(model(), Probe((9,))),
        UnsupportedMethod, "LLM layer 9", "has layers 0 to 3", "choose among them",
    ),
    "LLM rows": Case(
        lambda: vtc.compress(model(), Probe(needs=Needs(llm={1: Rows.CLS}))),
        UnsupportedMethod, "'cls' was asked for", "is a reading of the vision encoder", "write Rows.LAST",
    ),
    # taps
    "eager attention": Case(
        lambda: vtc.compress(model(attn_implementation="eager"), "vtc_cls", keep=4),
        UnsupportedModel, "CLIPAttention", "runs eager attention", "attn_implementation='sdpa'",
    ),
    # vision
    "vision layer": Case(
        lambda: vtc.compress(model(), Probe(needs=Needs({4: Rows.CLS}))),
        UnsupportedMethod, "vision layer 4", "has layers 0 to 3", "choose among them",
    ),
    "no class token": Case(
        lambda: vtc.compress(tiny_model("llava-siglip"), Probe(needs=Needs({1: Rows.CLS}))),
        UnsupportedMethod, "attention of the class token", "of this llava model has none", "use Rows.RECEIVED",
    ),
    "encoder that stops early": Case(
        without_tower,
        UnsupportedMethod, "vision layer 0", "did not run, the encoder stops before it", "ask for layers up to 2",
    ),
    "unnamed method": Case(
        lambda: shared([], vtc.create("vtc_cls")),
        UnsupportedCall, "vision layers [0, 1, 2]", "without the attention of", "name every method that will be used",
    ),
    "another feature layer": Case(
        lambda: run("vtc_cls", lambda subject, inputs: inputs.update(vision_feature_layer=-1), keep=4),
        UnsupportedCall, "vision_feature_layer=-1", "planned for the configuration's -2", "before vtc.compress instead",
    ),
    "LLM reading of the encoder": Case(
        lambda: vtc.compress(model(), Probe(needs=Needs({1: Rows.LAST}))),  # type: ignore[dict-item]
        UnsupportedMethod, "'last' was asked for", "is a reading of the LLM", "write Rows.RECEIVED",
    ),
    # several methods
    "parts that are no methods": Case(
        lambda: Composite(("vtc_cls",), (None,)),  # type: ignore[arg-type]
        VTCError, "parts=('vtc_cls',)", "are no methods", "write for example (vtc.create('vtc_cls'),)",
    ),
    "budgets that do not fit": Case(
        lambda: Composite((INNER,), ()),
        BudgetError, "budgets=()", "do not fit 1 methods", "write one vtc.Budget for each",
    ),
    "one stage for two": Case(
        lambda: vtc.compress(model(), ["vtc_cls", "random"], retention=[0.5, 0.5]),
        UnsupportedMethod, "'vtc_cls' and 'random'", "both act at 0", "switch that stage of one of them off",
    ),
    "two budgets inside the LLM": Case(
        lambda: vtc.compress(model(), [LastRowTopK(layer=1), LastRowTopK(layer=2)], retention=[0.5, 0.9]),
        UnsupportedMethod, "'last_row_top_k' and 'last_row_top_k'", "a mean over all layers", "to one of them",
    ),
    "one budget for two": Case(
        lambda: vtc.compress(model(), ["vtc_cls", LastRowTopK()], retention=0.5),
        BudgetError, "one retention given for 2 methods", "(vtc_cls, last_row_top_k)", "one entry per method",
    ),
    "too many budgets": Case(
        lambda: vtc.compress(model(), ["vtc_cls", INNER], keep=[3, None, 4]),
        BudgetError, "keep has 3 entries", "for 2 methods", "write one per method",
    ),
    "budget for a part without": Case(
        lambda: vtc.compress(model(), ["vtc_cls", INNER], retention=[0.5, 0.5]),
        BudgetError, "'fixed_keep'", "takes no retention or keep", "write None in its place",
    ),
    "no methods": Case(
        lambda: vtc.compress(model(), ["vtc_cls", 3], retention=0.5),  # type: ignore[list-item]
        VTCError, "method=['vtc_cls', 3]", "is no list of methods", "write for example [vtc.create('hiprune'",
    ),
    # soft masks
    "soft masks with a cache": Case(
        lambda: run(Soft((2,))),
        UnsupportedCall, "at stage 2 of a call with a cache", "are for training", "use_cache=False",
    ),
    "soft masks elsewhere": Case(
        lambda: run(Soft((2,)), flex_llm),
        UnsupportedCall, "not 'flex_attention'", "attention that takes an additive mask", "attn_implementation='sdpa'",
    ),
    "skipping a layer without a stage": Case(
        lambda: vtc.compress(model(), FixedKeep(at=(1,), skips=(2,))),
        UnsupportedMethod, "'fixed_keep' skip LLM layer 2", "has no stage", "layers from 1 on that are stages",
    ),
    "skipping a layer before the cache": Case(
        lambda: vtc.compress(model(), FixedKeep(at=(1, AFTER_PREFILL), skips=(1,))),
        UnsupportedMethod, "'fixed_keep' skip a layer", "acts on the cache", "without stages after the prefill",
    ),
    "masks where tokens skip a layer": Case(
        lambda: run(SoftSkip((2,))),
        UnsupportedCall, "soft masks were given at stage 2", "masks hold from a layer on", "at another stage",
    ),
    "gains that the plan does not know": Case(
        lambda: run(Weighed((2,))),
        UnsupportedCall, "gains were given at stage 2", "the plan of 'probe' has none", "skips=(2,), gains=True",
    ),
    "windows under flash attention": Case(
        lambda: run("visual_window", flash_llm),
        UnsupportedCall, "what visual tokens see of each other is limited", "'flash_attention_2' attention has no mask",
        "attn_implementation='sdpa'",
    ),
    # adapters
    "model class": Case(
        lambda: vtc.compress(nn.Linear(2, 2), "vtc_cls", keep=4),
        UnsupportedModel, "Linear is not supported", "supported model classes: ", "'vtc.adapters'",
    ),
    "sliding window": Case(
        lambda: vtc.compress(sliding(), "vtc_cls", keep=4),
        UnsupportedModel, "sliding_window=8", "would differ from their positions", "Load the checkpoint with",
    ),
}  # fmt: skip


def caught(case: Case) -> VTCError:
    with pytest.raises(VTCError) as found:
        case.trigger()
    return found.value


@pytest.mark.parametrize("name", CASES)
def test_the_message_helps(name: str) -> None:
    case = CASES[name]
    error = caught(case)
    assert type(error) is case.error
    message = str(error)
    for fragment in (case.given, case.why, case.write):
        assert fragment in message
    assert "<" not in message.replace("<name>", "")  # no object's address
    assert "\n" not in message
    assert not message.endswith((".", " "))
    assert "  " not in message


def raised_at(error: BaseException) -> tuple[Path, int]:
    """File and line of the deepest frame inside the core."""
    homes = [HOME / room for room in CORE]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent in homes]
    return Path(frames[-1].filename), frames[-1].lineno or 0


def test_every_raise_of_the_core_has_a_case() -> None:
    """A new `raise` needs a line in CASES, so that its message is read once more by somebody."""
    lines = {raised_at(caught(case)) for case in CASES.values()}
    missing = []
    for path in (HOME / room / f"{name}.py" for room, names in CORE.items() for name in names):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and node.exc is not None and not ast.unparse(node.exc).startswith("_"):
                end = node.end_lineno or node.lineno
                if not any(file == path and node.lineno <= line <= end for file, line in lines):
                    missing.append(f"{path.name}:{node.lineno} {ast.unparse(node.exc)[:90]}")
    assert missing == []


# --- the tree
def test_one_root_for_everything() -> None:
    classes = [c for c in vars(vtc.errors).values() if inspect.isclass(c) and c.__module__ == "vtc.errors"]
    assert VTCError in classes
    assert all(issubclass(c, VTCError) for c in classes)
    assert issubclass(VTCError, ValueError)
    tree = vtc.errors.__doc__ or ""
    for c in classes:
        assert c.__name__ in tree, "the drawing at the top of errors.py lacks a class"
        assert (c.__doc__ or "").strip()
    assert {case.error for case in CASES.values()} >= {BudgetError, UnknownName, UnsupportedCall, UnsupportedMethod}


def test_unknown_names_in_any_case() -> None:
    message = str(unknown_name("model", "LLAVA-clip", ["llava-clip", "Qwen", "LLaVA-Next"]))
    assert message == (
        "unknown model 'LLAVA-clip'; did you mean 'llava-clip' or 'LLaVA-Next'? Known models: "
        "LLaVA-Next, Qwen, llava-clip"
    )
    assert str(unknown_name("task", "zzz", [])) == "unknown task 'zzz'; Known tasks: none"


def test_budget_errors_come_before_the_model_is_looked_at() -> None:
    with pytest.raises(BudgetError):
        vtc.compress(nn.Linear(2, 2), "vtc_cls")
    assert Budget(keep=3) is not None
    assert adapters.supported_classes()
