"""Charts of a bench: where the time to the first token goes, and break-even over numbers of visual tokens."""

from __future__ import annotations

from vtc.eval.bench.arms import UNTOUCHED
from vtc.eval.bench.parts import PARTS
from vtc.eval.bench.record import Record, SceneRecord
from vtc.eval.bench.summary import MODEL, lines, spread, taken
from vtc.eval.charts import COLOURS, CONFIG, FONT, INK, SCHEMA, Spec, chart, short

TO_FIRST = tuple(part for part in PARTS if part not in ("decode", "other"))


def bars(scene: SceneRecord) -> Spec:
    """Medians of the parts up to the first new token, a bar per arm; behind it the median of their sum."""
    values, ends = [], []
    for line in lines(scene):
        own = {part: line.median(part) or 0.0 for part in TO_FIRST}
        first = line.median("first_token") or 0.0
        own["other"] = max(0.0, first - sum(own.values()))
        values += [
            {"arm": line.arm, "part": part, "ms": short(1000 * seconds), "order": number}
            for number, (part, seconds) in enumerate(own.items())
        ]
        ends.append({"arm": line.arm, "ms": short(1000 * sum(own.values())), "text": f"{1000 * first:.4g}"})
    names = [*TO_FIRST, "other"]
    y: Spec = {"field": "arm", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 190}}
    x: Spec = {
        "field": "ms", "type": "quantitative", "title": f"ms to the first token, batch {scene.batch}",
        "axis": {"tickCount": 6},
    }  # fmt: skip
    colour: Spec = {
        "field": "part", "type": "nominal", "title": None, "legend": {"orient": "top", "columns": 6},
        "scale": {"domain": names, "range": list(COLOURS[: len(names)])},
    }  # fmt: skip
    tip = [{"field": name, "type": "nominal"} for name in ("arm", "part", "ms")]
    layers: list[Spec] = [
        {"mark": "bar", "encoding": {"y": y, "x": x | {"stack": "zero"}, "color": colour, "tooltip": tip,
                                     "order": {"field": "order", "type": "quantitative"}}},
        {"data": {"values": ends}, "mark": {"type": "text", "align": "left", "dx": 5, "fontSize": FONT},
         "encoding": {"y": y, "x": x, "text": {"field": "text"}}},
    ]  # fmt: skip
    return chart(layers, 22 * max(1, len(ends)), values) | {"padding": {"left": 4, "top": 6, "bottom": 4, "right": 30}}


def curves(record: Record) -> Spec:
    """Vision tower, selection and prefill against the visual tokens of the untouched prompt, a line per arm.

    Dashed: the vision tower alone, which nothing that acts behind it can get below.
    """
    scenes, drawn = record.curve, list[Spec]()
    for scene in scenes:
        for arm, facts in scene.arms.items():
            if facts.kind in ("untouched", "method") and (took := spread(taken(scene, arm, MODEL))) is not None:
                ends = {"low": short(1000 * took.low), "high": short(1000 * took.high)}
                drawn.append({"arm": arm, "tokens": scene.visual, "ms": short(1000 * took.median), **ends})
    floor = [
        {"tokens": scene.visual, "ms": short(1000 * found.median)}
        for scene in scenes
        if (found := spread(taken(scene, UNTOUCHED, ["vision"]))) is not None
    ]
    names = list(dict.fromkeys(point["arm"] for point in drawn))
    x: Spec = {
        "field": "tokens", "type": "quantitative", "title": "visual tokens of the untouched prompt",
        "scale": {"zero": False}, "axis": {"tickCount": 8},
    }  # fmt: skip
    y: Spec = {"field": "ms", "type": "quantitative", "title": "vision, selection and prefill, ms, batch 1"}
    colour: Spec = {
        "field": "arm", "type": "nominal", "title": None, "legend": {"orient": "right", "labelLimit": 200},
        "scale": {"domain": names, "range": [COLOURS[n % len(COLOURS)] for n in range(len(names))]},
    }  # fmt: skip
    tip = [{"field": name, "type": "nominal"} for name in ("arm", "tokens", "ms", "low", "high")]
    under: Spec = {"data": {"values": floor}}
    layers: list[Spec] = [
        {**under, "mark": {"type": "line", "strokeDash": [5, 4], "color": INK}, "encoding": {"x": x, "y": y}},
        {"data": {"values": floor[-1:]},
         "mark": {"type": "text", "align": "right", "dy": -8, "fontSize": FONT, "text": "vision tower alone"},
         "encoding": {"x": x, "y": y}},
        {"mark": {"type": "line", "strokeWidth": 1.8}, "encoding": {"x": x, "y": y, "color": colour}},
        {"mark": {"type": "rule"}, "encoding": {"x": x, "y": y | {"field": "low"}, "y2": {"field": "high"},
                                                "color": colour}},
        {"mark": {"type": "point", "filled": True, "size": 42},
         "encoding": {"x": x, "y": y, "color": colour, "tooltip": tip}},
    ]  # fmt: skip
    return chart(layers, 300, drawn)


def figure(record: Record) -> Spec:
    """All charts below one another, as a picture."""
    panels = [bars(scene) for scene in record.main.values() if scene.rounds]
    panels += [curves(record)] if record.curve else []
    kept = ("data", "layer", "height")
    return {
        "$schema": SCHEMA, "title": record.machine["title"], "config": CONFIG | {"background": "white"}, "padding": 14,
        "vconcat": [{"width": 620, **{name: panel[name] for name in kept}} for panel in panels] or [_nothing()],
        "spacing": 40, "resolve": {"scale": {"color": "independent"}, "legend": {"color": "independent"}},
    }  # fmt: skip


def _nothing() -> Spec:
    return {"data": {"values": [{}]}, "mark": {"type": "text", "text": "no round is finished", "fontSize": 14}}
