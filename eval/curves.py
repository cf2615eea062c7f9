"""A metric against what it costs: a line per method, which ends in its name.

The horizontal axes run from everything on the left to little on the right, where lines are furthest apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from vtc.eval.charts import COLOURS, CONFIG, FONT, INK, SCHEMA, Spec, chart, domain, short
from vtc.eval.results import Results
from vtc.eval.tables import Grid, grid, nominal, short_names

SHAPES = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross")
AXES = {
    "share": "visual tokens, % of all (achieved)",
    "flops": "FLOPs per question, of prefill or encoder",
    "seconds": "seconds per answer, measured",
}
MANY = 6
"""Intervals of more methods would cover each other; they show where a line is pointed at."""


def colours(methods: Sequence[str]) -> dict[str, str]:
    """A colour for each method."""
    return {method: COLOURS[number % len(COLOURS)] for number, method in enumerate(methods)}


def points(results: Results, data: Grid) -> list[Spec]:
    """One point for each line of a grid, in percent where the grid is, with every horizontal position known of it."""
    factor = 100.0 if data.percent else 1.0
    made = []
    for (method, retention), line in data.entries.items():
        stored = results.stored.get((data.task, data.metric, line.get("cell") or ""), {})
        share = 100 * line["visual_tokens_kept"] / line["visual_tokens_in"] if line["visual_tokens_in"] else None
        point = {
            "method": method,
            "retention": nominal(retention),
            "value": line["value"] * factor,
            "low": None if line["ci_low"] is None else line["ci_low"] * factor,
            "high": None if line["ci_high"] is None else line["ci_high"] * factor,
            "tokens": line["visual_tokens_kept"],
            "share": share,
            "flops": line.get("flops"),
            "seconds": stored.get("seconds"),
        }
        if line.get("spread") is not None:
            point["spread"] = line["spread"] * factor
        made.append({name: short(value) for name, value in point.items()})
    return made


def axes(drawn: Sequence[Spec]) -> list[str]:
    """The horizontal axes on which at least two points have a positive place."""
    return [axis for axis in AXES if sum((point[axis] or 0) > 0 for point in drawn) > 1]


def front(drawn: Sequence[Spec], axis: str, *, better: bool = True) -> list[Spec]:
    """The points that no other one beats: at least as good for no more, and better in one of both; the cheapest first.

    >>> drawn = [{"x": 1, "value": 5}, {"x": 2, "value": 4}, {"x": 3, "value": 9}]
    >>> front(drawn, "x")
    [{'x': 1, 'value': 5}, {'x': 3, 'value': 9}]
    """
    sign = 1 if better else -1
    best, chosen = -math.inf, []
    for point in sorted((p for p in drawn if p[axis]), key=lambda p: (p[axis], -sign * p["value"])):
        if sign * point["value"] > best:
            best = sign * point["value"]
            chosen.append(point)
    return chosen


def curves(results: Results, data: Grid, axis: str, *, height: int = 380, labels: bool = True) -> Spec:
    """A metric against one of `AXES`, a line per method, with the Pareto front as a broad pale line.

    labels: each line ends in its name, moved up or down where names would cover each other.
    """
    drawn = [point for point in points(results, data) if point[axis]]
    factor = 100.0 if data.percent else 1.0
    line = data.baseline
    better = line["higher_is_better"] if line is not None else True
    tone = colours(data.methods)
    names = short_names(data.methods)
    few = len(data.methods) <= MANY
    shown = ("value", "low", "high") if few else ("value",)
    values = [point[name] for point in drawn for name in shown if point[name] is not None]
    low, high = domain(values + ([line["value"] * factor] if line else []))
    if data.percent and max(values, default=0.0) <= 100:
        high = min(high, 100.0)
    x: Spec = {
        "field": axis, "type": "quantitative", "scale": {"type": "log", "reverse": True, "nice": False},
        "axis": {"title": AXES[axis] if labels else None, "grid": False, "format": "~s", "labelOverlap": True},
    }  # fmt: skip
    if axis == "share":
        ticks = {round(100 * retention, 1) for _, retention in data.entries if isinstance(retention, float)}
        ticks |= {round(point["share"], 1) for point in drawn if point["retention"].endswith(" tokens")}
        x["axis"] |= {"format": "~g"} | ({"values": sorted(ticks)} if ticks else {})
    unit = " (%)" if data.percent else ""
    y: Spec = {
        "field": "value", "type": "quantitative", "scale": {"domain": [low, high], "zero": False, "nice": False},
        "axis": {"title": f"{data.metric}{unit}" if labels else None, "tickCount": 5},
    }  # fmt: skip
    colour = {
        "field": "method", "type": "nominal", "legend": None,
        "scale": {"domain": list(tone), "range": list(tone.values())},
    }  # fmt: skip
    lit: Spec = {"condition": {"param": "lit", "value": 1, "empty": True}, "value": 0.12}
    layers: list[Spec] = []
    if line is not None:
        rule = [{"value": line["value"] * factor}]
        layers.append({"data": {"values": rule}, "mark": {"type": "rule", "strokeDash": [5, 4], "color": INK}}
                      | {"encoding": {"y": y}})  # fmt: skip
    if labels and len(drawn) > 1:
        shape = {"type": "line", "interpolate": "step-before", "strokeWidth": 9, "opacity": 0.13, "color": INK}
        edge = front(drawn, axis, better=better)
        layers.append({"data": {"values": edge}, "mark": shape, "encoding": {"x": x, "y": y}})
    whiskers = {"condition": {"param": "lit", "value": 0.6, "empty": few}, "value": 0}
    layers += [
        {"mark": {"type": "line", "strokeWidth": 1.8}, "encoding": {"x": x, "y": y, "color": colour, "opacity": lit}},
        {"mark": {"type": "rule", "clip": True}, "transform": [{"filter": "datum.low != null"}],
         "encoding": {"x": x, "y": y | {"field": "low"}, "y2": {"field": "high"}, "color": colour,
                      "opacity": whiskers}},
        {"mark": {"type": "point", "filled": True, "size": 42 if labels else 22},
         "params": [{"name": "lit", "select": {"type": "point", "fields": ["method"], "on": "pointerover",
                                               "clear": "pointerout"}}],
         "encoding": {"x": x, "y": y, "color": colour, "opacity": lit, "shape": {
             "field": "method", "type": "nominal", "legend": None,
             "scale": {"domain": list(tone), "range": [SHAPES[n % len(SHAPES)] for n in range(len(tone))]}},
             "tooltip": _tooltip(drawn, data, axis)}},
    ]  # fmt: skip
    if labels and drawn:
        ends = _ends(drawn, data.methods, names, axis, (low, high), height, line["value"] * factor if line else None)
        at = {"data": {"values": ends}}
        place: Spec = {"field": "place", "type": "quantitative", "scale": y["scale"]}
        layers += [
            {**at, "transform": [{"filter": "datum.share != null"}],
             "mark": {"type": "rule", "strokeDash": [1, 3], "clip": False},
             "encoding": {"x": x, "x2": {"value": "width"}, "y": y, "y2": {"field": "place"}, "color": colour,
                          "opacity": {"value": 0.6}}},
            {**at, "mark": {"type": "text", "align": "left", "dx": 6, "fontSize": FONT, "baseline": "middle"},
             "encoding": {"x": {"value": "width"}, "y": place, "text": {"field": "name"},
                          "color": {"condition": {"test": "datum.method == ''", "value": INK}, **colour}}},
        ]  # fmt: skip
    return chart(layers, height, drawn) | {"padding": {"left": 4, "top": 8, "bottom": 4, "right": 6}}


def _ends(
    drawn: Sequence[Spec],
    methods: Sequence[str],
    names: Mapping[str, str],
    axis: str,
    domain: tuple[float, float],
    height: int,
    untouched: float | None,
) -> list[Spec]:
    """Where each line ends, and where its name stands, so far apart that names can be read."""
    ends = []
    for method in methods:
        own = [point for point in drawn if point["method"] == method]
        if own:
            last = min(own, key=lambda point: point[axis])
            ends.append({**last, "axis": last[axis], "name": names[method], "place": last["value"]})
    if untouched is not None:
        ends.append({"method": "", "name": "untouched", "value": untouched, "place": untouched, axis: None})
    gap = (domain[1] - domain[0]) * (FONT + 2) / height
    places = spread([end["place"] for end in ends], gap, domain)
    return [end | {"place": place, "share": end.get(axis)} for end, place in zip(ends, places, strict=True)]


def spread(wanted: Sequence[float], gap: float, domain: tuple[float, float]) -> list[float]:
    """Places at least `gap` apart, in the order of those wanted and near them, inside `domain` where it has room.

    >>> [round(place, 2) for place in spread([1.0, 1.0, 5.0], 1.0, (0.0, 10.0))]
    [0.5, 1.5, 5.0]
    """
    order = sorted(range(len(wanted)), key=lambda number: wanted[number])
    groups: list[list[float]] = []  # of [sum of (wanted - offset), count]: runs of names that touch
    for number in order:
        groups.append([wanted[number], 1.0])
        while len(groups) > 1:
            (before, size), (total, count) = groups[-2:]
            if before / size + gap * (size - 1) / 2 + gap <= total / count - gap * (count - 1) / 2 + 1e-12:
                break
            groups[-2:] = [[before + total, size + count]]
    places = [0.0] * len(wanted)
    position = 0
    floor = domain[0]
    for total, count in groups:
        start = max(total / count - gap * (count - 1) / 2, floor)
        start = max(floor, min(start, domain[1] - gap * (len(order) - position - 1)))
        for _ in range(int(count)):
            places[order[position]] = start
            position, start = position + 1, start + gap
        floor = start
    return places


def _tooltip(drawn: Sequence[Spec], data: Grid, axis: str) -> list[Spec]:
    fields = {"method": "method", "retention": "retention asked for", "value": data.metric, "low": "95 % from",
              "high": "to", "spread": "standard deviation over seeds", "tokens": "visual tokens", "share": "% of all",
              axis: AXES[axis]}  # fmt: skip
    known = [name for name in fields if any(point.get(name) is not None for point in drawn)]
    return [{"field": name, "title": fields[name], "type": "nominal"} for name in known]


def figure(results: Results) -> Spec:
    """One panel per task, the picture beside the report: its main metric against the achieved tokens, or against FLOPs
    where a method leaves as many tokens at several budgets, as those do that restore what they merged."""
    panels = []
    for task in results.tasks:
        data = grid(results, task, results.main_metric(task))
        panel = {"title": {"text": task, "anchor": "start"}, "width": 520, "height": 380}
        if not data.methods and data.baseline is None:
            mark = {"type": "text", "text": "no cell is complete", "fontSize": 14}
            panels.append(panel | {"data": {"values": [{}]}, "mark": mark})
        else:
            spec = curves(results, data, _axis(points(results, data)))
            panels.append(
                panel
                | {"data": spec["data"], "layer": [_apart(layer, len(data.methods) <= MANY) for layer in spec["layer"]]}
            )
    return {
        "$schema": SCHEMA, "title": str(results.run["model"]["name"]), "config": CONFIG | {"background": "white"},
        "columns": min(len(panels), 3), "concat": panels, "spacing": 40, "padding": 14,
        "resolve": {"scale": dict.fromkeys(("x", "y", "color", "shape"), "independent")},
    }  # fmt: skip


def _axis(drawn: Sequence[Spec]) -> str:
    shares = {(point["method"], point["share"]) for point in drawn}
    return "flops" if len(shares) < len(drawn) and "flops" in axes(drawn) else "share"


def _apart(layer: Spec, few: bool) -> Spec:
    """A layer for a picture: nothing to point at."""
    encoding = {name: value for name, value in layer["encoding"].items() if name not in ("opacity", "tooltip")}
    if layer["mark"]["type"] == "rule" and "y2" in encoding and encoding["y2"].get("field") == "high":
        encoding["opacity"] = {"value": 0.4 if few else 0}
    return {name: value for name, value in layer.items() if name != "params"} | {"encoding": encoding}
