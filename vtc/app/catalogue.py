"""Tables of what is there: methods and model families, as plain data for people and machines."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from vtc import adapters, embedded
from vtc.engine.attach import compress
from vtc.errors import UnsupportedMethod, VTCError, shown, unknown_name
from vtc.method.base import CacheStage, Compressor, EncoderStage, ModelSpec, Plan, Stage
from vtc.method.readings import Reading
from vtc.method.registry import METHODS, create


def stage_name(stage: Stage) -> str:
    """A stage in words.

    >>> stage_name(0), stage_name(2), stage_name(CacheStage()), stage_name(EncoderStage(1))
    ('pre-llm', 'llm layer 2', 'after prefill', 'encoder layer 1')
    """
    if isinstance(stage, EncoderStage):
        return f"encoder layer {stage.layer}"
    if isinstance(stage, CacheStage):
        return "after prefill" if not stage.from_layer else f"after prefill from llm layer {stage.from_layer}"
    return "pre-llm" if stage == 0 else f"llm layer {stage}"


def stage_kind(stage: Stage) -> str:
    """Where a stage lies, without its number.

    >>> stage_kind(0), stage_kind(2), stage_kind(CacheStage(1)), stage_kind(EncoderStage(1))
    ('pre-llm', 'llm', 'after prefill', 'encoder')
    """
    if isinstance(stage, EncoderStage):
        return "encoder"
    if isinstance(stage, CacheStage):
        return "after prefill"
    return "pre-llm" if stage == 0 else "llm"


STAGES = {"encoder": "encoder", "pre_llm": "pre-llm", "llm": "llm", "cache": "after prefill"}
"""Kinds of stages, as `list_methods` takes them -> in words."""


def list_methods(
    pattern: str = "*", *, stage: str | None = None, trained: bool | None = None, family: str | None = None
) -> list[str]:
    """Names of registered methods, third-party ones included, in alphabetical order.

    pattern: a name, in which * stands for any letters and ? for one. stage: methods that act in the "encoder", at
    "pre_llm", inside the "llm" or on the "cache", by their defaults on reference checkpoints, of `family` where it is
    given. trained: True for methods on learned weights, False for the others. family: of models they run on.
    Raises UnknownName, with near matches, for a pattern no name fits and for a stage or family that does not exist.

    >>> list_methods("vq*"), list_methods(stage="encoder", family="llava", trained=False)[:2]
    (['vqtoken', 'vqtoken_codebook'], ['aim', 'diffrate'])
    """
    names = METHODS.names()
    found = [name for name in names if fnmatchcase(name, pattern)] if isinstance(pattern, str) else []
    if not found:
        raise unknown_name("method", pattern, names)
    if trained is not None and not isinstance(trained, bool):
        raise VTCError(f"trained={shown(trained)} is neither True nor False; leave it out to list both kinds")
    if trained is not None:
        found = [name for name in found if METHODS.get(name).trained is trained]
    if stage is None and family is None:
        return found
    for kind, given, known in (("stage", stage, STAGES), ("family", family, adapters.families())):
        if given is not None and (not isinstance(given, str) or given not in known):
            raise unknown_name(kind, given, known)
    wanted = None if stage is None else STAGES[stage]
    return [name for name in found if _acts(METHODS.get(name), wanted, family)]


def acting_inside(encoder: Any) -> dict[str, dict[str, Any]]:
    """Every registered method that acts inside this encoder alone, with the hyper-parameters it needs for that.

    One that has a form inside encoders beside others tells so by a hyper-parameter `inside`.

    >>> from vtc.testing.encoders import build
    >>> acting_inside(build("CLIPModel"))["tome"]
    {'inside': True}
    """
    found = {}
    for name in METHODS.names():
        fields = {field.name for field in dataclasses.fields(METHODS.get(name))}
        for options in ({}, *([{"inside": True}] if "inside" in fields else [])):
            with contextlib.suppress(VTCError):
                method = create(name, **options)
                limits: dict[str, Any] = {"retention": 0.5} if method.needs_budget else {}
                compress(encoder, method, trace=False, **limits).detach()
                found[name] = options
                break
    return found


def _acts(cls: type[Compressor], kind: str | None, family: str | None) -> bool:
    plans = [plan for on, plan in _plans(cls) if family in (None, on)]
    return any(kind is None or kind in map(stage_kind, plan.stages) for plan in plans)


def _plans(cls: type[Compressor]) -> Iterator[tuple[str, Plan]]:
    """Each family and the plan of the method's defaults on each of its reference checkpoints, where it can run."""
    method = _by_default(cls)
    if method is None:
        return
    for family, adapter in adapters.families().items():
        for reference in adapter.references:
            with contextlib.suppress(UnsupportedMethod):
                yield family, method.plan(reference)


def _by_default(cls: type[Compressor]) -> Compressor | None:
    """None where a hyper-parameter has no default, so that nothing is known about stages."""
    try:
        return cls.from_options()
    except VTCError:
        return None


def describe_methods(names: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """One entry per method: name, summary, stages, needs, trained, families, positions, hyper-parameters.

    names: of methods, all registered ones by default. stages: where it acts on some family, as kinds; plans: the stages
    and needs on each family's reference checkpoints; families: where it runs at all.
    """
    return [_method(METHODS.get(name)) for name in (list_methods() if names is None else names)]


def _method(cls: type[Compressor]) -> dict[str, Any]:
    method, found = _by_default(cls), list(_plans(cls))
    kinds = {stage_kind(stage) for _, plan in found for stage in plan.stages}
    plans = [
        {
            "family": family,
            "stages": [stage_name(stage) for stage in plan.stages],
            "needs": [
                *_needs(plan.needs.vision_pairs, "vision"),
                *_needs(plan.needs.llm_pairs, "llm"),
                *(["pair: text of the question"] if plan.needs.pairs else []),
            ],
            "positions": plan.positions,
        }
        for family, plan in found
    ]
    text = inspect.cleandoc(cls.__doc__ or "")
    return {
        "name": cls.name,
        "summary": " ".join(text.split("\n\n")[0].split()),
        "stages": [kind for kind in STAGES.values() if kind in kinds],
        "needs": list(dict.fromkeys(need for plan in plans for need in plan["needs"])),
        "trained": cls.trained,
        "needs_budget": method is None or method.needs_budget,
        "families": sorted({family for family, _ in found}),
        "positions": sorted({plan.positions for _, plan in found}),
        "version": cls.version,
        "hyper_parameters": {f.name: _default(f) for f in dataclasses.fields(cls)},
        "plans": plans,
        "description": text,
    }


def _needs(pairs: Sequence[tuple[int, Reading]], where: str) -> list[str]:
    return [f"{where}: {name}" for name in dict.fromkeys(reading.name for _, reading in pairs)]


def _default(field: dataclasses.Field[Any]) -> Any:
    return None if field.default is dataclasses.MISSING else field.default


def describe_models() -> list[dict[str, Any]]:
    """Embedded models, supported families and encoders without an LLM: what `vtc models` tells.

    vision_attention: the rows methods can read, "cls" where a tower has a class token; positions: of what is removed
    before the LLM.
    """
    by_class = {cls: adapter for adapter in adapters.families().values() for cls in adapter.model_classes}
    shipped = [
        {
            "name": name,
            "kind": "embedded",
            "classes": _classes(name),
            "towers": [],
            "modalities": list(by_class[_classes(name)[0]].modalities),
            **_reads(by_class[_classes(name)[0]].references[:1]),
        }
        for name in embedded.NAMES
    ]
    families = [
        {
            "name": family,
            "kind": "family",
            "classes": list(adapter.model_classes),
            "towers": list(adapter.towers),
            "modalities": list(adapter.modalities),
            **_reads(adapter.references),
        }
        for family, adapter in adapters.families().items()
    ]
    own = [(name, ("open_clip.model.CLIP",)) for name in embedded.ENCODERS]
    known = [(family, adapter.model_classes) for family, adapter in adapters.encoder_families().items()]
    encoders = [
        {
            "name": name,
            "kind": "encoder",
            "classes": list(classes),
            "towers": [],
            "modalities": ["image"],
            "vision_attention": ["received"],
            "positions": "preserve",
        }
        for name, classes in own + known
    ]
    return shipped + families + encoders


def _reads(references: Sequence[ModelSpec]) -> dict[str, Any]:
    rows = [row for row, there in (("cls", any(r.has_cls for r in references)), ("received", True)) if there]
    return {"vision_attention": rows, "positions": "preserve" if any(r.mrope for r in references) else "compact"}


def _classes(name: str) -> list[str]:
    import json

    config = embedded.model_path(name) / "config.json"
    if not config.exists():
        raise VTCError(
            f"the embedded model {name!r} is missing from this installation; reinstall visual-token-compression"
        )
    architectures: list[str] = json.loads(config.read_text())["architectures"]
    return architectures
