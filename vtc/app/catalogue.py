"""Tables of what is there: methods and model families, as plain data for people and machines."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

from vtc import adapters, embedded
from vtc.errors import UnsupportedMethod, VTCError
from vtc.method.base import CacheStage, Compressor, EncoderStage, ModelSpec, Stage
from vtc.method.readings import Reading
from vtc.method.registry import METHODS, list_methods


def stage_name(stage: Stage) -> str:
    """A stage in words.

    >>> stage_name(0), stage_name(2), stage_name(CacheStage()), stage_name(EncoderStage(1))
    ('pre-llm', 'llm layer 2', 'after prefill', 'encoder layer 1')
    """
    if isinstance(stage, EncoderStage):
        return f"encoder layer {stage.layer}"
    if isinstance(stage, CacheStage):
        return "after prefill" if not stage.from_layer else f"after prefill, llm layer {stage.from_layer} on"
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


KINDS = ("encoder", "pre-llm", "llm", "after prefill")


def describe_methods() -> list[dict[str, Any]]:
    """One entry per registered method: name, summary, stages, needs, trained, families, positions, hyper-parameters.

    stages: where it acts on some family, as kinds; plans: the stages and needs on each family's reference checkpoints;
    families: where it runs at all.
    """
    return [_method(METHODS.get(name)) for name in list_methods()]


def _method(cls: type[Compressor]) -> dict[str, Any]:
    method = cls()
    plans: list[dict[str, Any]] = []
    kinds: set[str] = set()
    for family, adapter in adapters.families().items():
        for reference in adapter.references:
            try:
                plan = method.plan(reference)
            except UnsupportedMethod:
                continue
            kinds |= {stage_kind(stage) for stage in plan.stages}
            needs = _needs(plan.needs.vision_pairs, "vision") + _needs(plan.needs.llm_pairs, "llm")
            stages = [stage_name(stage) for stage in plan.stages]
            plans.append({"family": family, "stages": stages, "needs": needs, "positions": plan.positions})
    text = inspect.cleandoc(cls.__doc__ or "")
    return {
        "name": cls.name,
        "summary": " ".join(text.split("\n\n")[0].split()),
        "stages": [kind for kind in KINDS if kind in kinds],
        "needs": list(dict.fromkeys(need for plan in plans for need in plan["needs"])),
        "trained": cls.trained,
        "needs_budget": method.needs_budget,
        "families": sorted({plan["family"] for plan in plans}),
        "positions": sorted({plan["positions"] for plan in plans}),
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
    """Embedded models and supported families: classes, vision towers, modalities, attention rows, default positions.

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
            "modalities": ["image"],
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
    return shipped + families


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
