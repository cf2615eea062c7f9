"""Charts as Vega-Lite specifications: pages draw them in the browser, `picture` as a file.
Neutral ink is ``currentColor``, so that a chart takes the colour of the page's text, light or dark.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from vtc.eval.results import Asked
from vtc.eval.tables import Grid, short_names, significant

Spec = dict[str, Any]
VEGA_LITE = "6.4"
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
INK = "currentColor"
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#3BA3D8", "#8C6D31", "#7F7F7F", "#7B4FB5", "#C0392B",
    "#5B8C00", "#E377A2", "#17A2A2", "#A0522D", "#4C6FFF", "#9A8A00",
)  # fmt: skip
"""Okabe and Ito's colours, darkened where they fade on white, and more; names at their ends tell lines apart."""
CONFIG: Spec = {
    "background": None,
    "font": "system-ui, sans-serif",
    "axis": {
        "labelColor": INK, "titleColor": INK, "tickColor": INK, "domainColor": INK, "gridColor": INK,
        "gridOpacity": 0.12, "titleFontWeight": "normal", "labelLimit": 150,
    },
    "title": {"color": INK, "anchor": "start", "fontSize": 13},
    "legend": {"labelColor": INK, "titleColor": INK},
    "view": {"stroke": None},
    "text": {"color": INK},
}  # fmt: skip
FONT = 11


def dots(rows: Sequence[Spec], title: str, *, at: float | None = None, colour: str | None = None) -> Spec:
    """A value with its interval per row, in the order given: `name`, `value`, `low`, `high`, `sure`, `text`.

    at: where a dashed line marks equality. Rows whose `sure` is false are hollow. colour: a field that tells kinds
    apart.
    """
    ends = [row[name] for row in rows for name in ("value", "low", "high") if row.get(name) is not None]
    span = list(domain([*ends, *([at] if at is not None else [])]))
    x = {
        "field": "value", "type": "quantitative", "title": title, "axis": {"tickCount": 6},
        "scale": {"domain": span, "zero": False, "nice": False},
    }  # fmt: skip
    y = {"field": "name", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 150}}
    tone: Spec = {"value": COLOURS[0]}
    if colour is not None:
        tone = {"field": colour, "type": "nominal", "title": None, "legend": {"orient": "top"}}
        tone["scale"] = {"range": list(COLOURS[:6])}
    layers: list[Spec] = []
    if at is not None:
        mark = {"type": "rule", "strokeDash": [5, 4], "color": INK, "opacity": 0.6}
        layers.append({"data": {"values": [{"value": at}]}, "mark": mark, "encoding": {"x": x}})
    fill = {"condition": {"test": "datum.sure === false", "value": "transparent"}, **tone}
    tip = [{"field": name, "type": "nominal"} for name in rows[0] if name not in ("sure", "text")] if rows else []
    layers += [
        {"mark": {"type": "rule", "strokeWidth": 1.6}, "transform": [{"filter": "datum.low != null"}],
         "encoding": {"x": x | {"field": "low"}, "x2": {"field": "high"}, "y": y, "color": tone}},
        {"mark": {"type": "point", "size": 60, "strokeWidth": 1.6},
         "encoding": {"x": x, "y": y, "color": tone, "fill": fill if colour is None else tone, "tooltip": tip}},
        {"mark": {"type": "text", "align": "left", "dx": 8, "fontSize": FONT, "baseline": "middle"},
         "encoding": {"x": {"value": "width"}, "y": y, "text": {"field": "text"}}},
    ]  # fmt: skip
    return chart(layers, 21 * max(1, len({row["name"] for row in rows})), rows) | {
        "padding": {"left": 4, "top": 6, "bottom": 4, "right": 6}
    }


def matrix(cells: Sequence[Spec], names: Sequence[str], title: str) -> Spec:
    """Row minus column as colours and numbers: `one`, `other`, `diff`, `text`, and what the tooltip says."""
    most = max((abs(cell["diff"]) for cell in cells), default=1.0) or 1.0
    turned = {"labelAngle": -40, "orient": "top"}
    x = {"field": "other", "type": "nominal", "sort": list(names), "title": None, "axis": turned}
    y = {"field": "one", "type": "nominal", "sort": list(names), "title": None}
    scale = {"domain": [-most, 0, most], "range": ["#D55E00", "#f7f7f7", "#0072B2"]}
    colour = {"field": "diff", "type": "quantitative", "legend": None, "scale": scale}
    strong = {"condition": {"test": f"abs(datum.diff) > {0.6 * most}", "value": "white"}, "value": "#222"}
    tip = [{"field": name, "type": "nominal"} for name in cells[0]] if cells else []
    layers: list[Spec] = [
        {"mark": "rect", "encoding": {"x": x, "y": y, "color": colour, "tooltip": tip}},
        {"mark": {"type": "text", "fontSize": 10}, "encoding": {"x": x, "y": y, "text": {"field": "text"}}
         | {"color": strong}},
    ]  # fmt: skip
    return chart(layers, 22 * len(names), cells) | {"title": title}


def chart(layers: list[Spec], height: int, values: Sequence[Spec]) -> Spec:
    """Layers over the same values, as wide as their place."""
    return {
        "$schema": SCHEMA, "width": "container", "height": height, "autosize": {"type": "fit-x", "contains": "padding"},
        "config": CONFIG, "data": {"values": list(values)}, "layer": layers,
    }  # fmt: skip


def domain(values: Sequence[float]) -> tuple[float, float]:
    """The range of values with some air on both sides."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    air = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return short(low - air), short(high + air)


def short(value: Any) -> Any:
    """Numbers to five digits: pages stay small."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def picture(spec: Spec, kind: str) -> bytes:
    """A specification as PNG (kind "png", two pixels per unit) or SVG ("svg"), without a browser or a network."""
    import vl_convert

    if kind == "png":
        return bytes(vl_convert.vegalite_to_png(spec, vl_version=VEGA_LITE, scale=2.0))
    svg = str(vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE))
    names = dict.fromkeys(re.findall(r"\bclip\d+\b", svg))  # counted on from picture to picture in one process
    order = {name: f"clip{number}" for number, name in enumerate(names)}
    return re.sub(r"\bclip\d+\b", lambda found: order[found[0]], svg).encode()


@functools.cache
def library() -> str:
    """The code that draws specifications in a browser, as one script: Vega, Vega-Lite and Vega-Embed."""
    import vl_convert

    bundle = vl_convert.javascript_bundle(None, VEGA_LITE)  # type: ignore[arg-type]  # None means all of them
    return str(bundle).replace("</script", "<\\/script")


def differences(data: Grid, retention: Asked) -> list[Spec]:
    """Each method minus the untouched model at one retention, for `dots`; the best first, solid where it is sure."""
    factor = 100.0 if data.percent else 1.0
    rows = []
    for method in data.methods:
        line = data.entries.get((method, retention))
        if line is None or line["diff"] is None:
            continue
        ends = {end: line[f"diff_ci_{end}"] for end in ("low", "high")}
        rows.append({
            "name": short_names(data.methods)[method], "value": short(line["diff"] * factor),
            **{end: None if value is None else short(value * factor) for end, value in ends.items()},
            "p": short(line["p"]), "p_holm": short(line["p_holm"]), "sure": significant(line),
            "text": data.show_diff(line["diff"]) + ("*" if significant(line) else ""),
        })  # fmt: skip
    return sorted(rows, key=lambda row: -row["value"])
