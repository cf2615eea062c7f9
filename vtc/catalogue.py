"""Tables of what is there: methods and model families, as plain data for people and machines."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

from vtc import adapters
from vtc.compressor import CacheStage, Compressor, EncoderStage, ModelSpec, Stage
from vtc.errors import UnsupportedMethod, VTCError
from vtc.eval import tiny
from vtc.readings import Reading
from vtc.registry import METHODS, list_methods


def stage_name(stage: Stage) -> str:
    """A stage in words.

    >>> stage_name(0), stage_name(2), stage_name(CacheStage())
    ('pre-llm', 'llm layer 2', 'after prefill')
    """
    if isinstance(stage, EncoderStage):
        return f"encoder layer {stage.layer}"
    if isinstance(stage, CacheStage):
        return "after prefill" if not stage.from_layer else f"after prefill, llm layer {stage.from_layer} on"
    return "pre-llm" if stage == 0 else f"llm layer {stage}"


def describe_methods() -> list[dict[str, Any]]:
    """One entry per registered method: name, summary, stages, needs, trained, families, positions, hyper-parameters.

    Stages, needs and positions are those on a family's reference checkpoint; `families` lists where the method runs.
    """
    return [_method(METHODS.get(name)) for name in list_methods()]


def _method(cls: type[Compressor]) -> dict[str, Any]:
    method = cls()
    plans = {}
    for family, adapter in adapters.families().items():
        for reference in adapter.references:
            try:
                plans[family, reference.has_cls] = method.plan(reference)
            except UnsupportedMethod:
                continue
    stages: dict[str, None] = {}
    needs: dict[str, None] = {}
    for plan in plans.values():
        stages |= dict.fromkeys(map(stage_name, plan.stages))
        needs |= dict.fromkeys(_needs(plan.needs.vision_pairs, "vision"))
        needs |= dict.fromkeys(_needs(plan.needs.llm_pairs, "llm"))
    text = inspect.cleandoc(cls.__doc__ or "")
    return {
        "name": cls.name,
        "summary": " ".join(text.split("\n\n")[0].split()),
        "stages": list(stages),
        "needs": list(needs),
        "trained": cls.trained,
        "families": sorted({family for family, _ in plans}),
        "positions": sorted({plan.positions for plan in plans.values()}),
        "version": cls.version,
        "hyper_parameters": {f.name: _default(f) for f in dataclasses.fields(cls)},
        "description": text,
    }


def _needs(pairs: Sequence[tuple[int, Reading]], where: str) -> list[str]:
    return [f"{where} attention ({name})" for name in sorted({reading.name for _, reading in pairs})]


def _default(field: dataclasses.Field[Any]) -> Any:
    return None if field.default is dataclasses.MISSING else field.default


def describe_models() -> list[dict[str, Any]]:
    """Embedded models and supported families: classes, vision towers, modalities, attention rows, default positions.

    vision_attention: the rows methods can read, "cls" where a tower has a class token; positions: of what is removed
    before the LLM.
    """
    by_class = {cls: adapter for adapter in adapters.families().values() for cls in adapter.model_classes}
    embedded = [
        {
            "name": name,
            "kind": "embedded",
            "classes": _classes(name),
            "towers": [],
            "modalities": ["image"],
            **_reads(by_class[_classes(name)[0]].references[:1]),
        }
        for name in tiny.NAMES
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
    return embedded + families


def _reads(references: Sequence[ModelSpec]) -> dict[str, Any]:
    rows = [row for row, there in (("cls", any(r.has_cls for r in references)), ("received", True)) if there]
    return {"vision_attention": rows, "positions": "preserve" if any(r.mrope for r in references) else "compact"}


def _classes(name: str) -> list[str]:
    import json

    config = tiny.model_path(name) / "config.json"
    if not config.exists():
        raise VTCError(f"the embedded model {name!r} is missing from this installation; reinstall vtc")
    architectures: list[str] = json.loads(config.read_text())["architectures"]
    return architectures
