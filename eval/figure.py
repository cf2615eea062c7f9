"""One picture of a sweep: each method's metric against the visual tokens it really keeps, one panel per task."""

from __future__ import annotations

import io
import math
from typing import Any

from vtc.eval.results import Results
from vtc.eval.tables import Grid, grid, short_names

# Okabe and Ito's colours, which stay apart for colour-blind readers, without the black of the baseline.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7F7F7F")
MARKERS = "osD^vPX*<>phd8H"
LINES = ("-", "--", ":", "-.")
"""Numbers of colours and markers have no common divisor, so their pairs come back after 120 lines; every round of the
colours has its own kind of line."""
MANY = len(COLOURS)
"""Above so many methods the legend moves beside the panel and the bands, which would cover each other, go."""


def style(number: int) -> dict[str, Any]:
    """How line `number` of a panel looks.

    >>> style(0) == style(8)
    False
    """
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": LINES[number // len(COLOURS) % len(LINES)],
    }


def caption(data: Grid) -> str:
    """What a panel shows, in words: only what is drawn there."""
    banded = [*data.entries.values()] if len(data.methods) <= MANY else []
    whose = ["the methods"] if any(line["ci_low"] is not None for line in banded) else []
    words = []
    if data.baseline is not None:
        words.append("Dashed and black: the untouched model.")
        whose += ["the untouched model"] if data.baseline["ci_low"] is not None else []
    return " ".join([*words, *([f"Bands: 95 % intervals of {' and '.join(whose)}."] if whose else [])])


def _verbatim(name: str) -> str:
    """A name as matplotlib shows it unchanged; dollars would begin a formula."""
    return name.replace("$", r"\$")


def draw(results: Results) -> bytes:
    """The figure as PNG.

    The x axis is logarithmic and shows the achieved retention, kept over incoming visual tokens, so that methods that
    keep more than they were asked to stand further right. `caption` says which bands are drawn.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = results.tasks
    columns = min(len(tasks), 3)
    rows = math.ceil(len(tasks) / columns)
    grids = [grid(results, task, results.main_metric(task)) for task in tasks]
    beside = 2.4 if any(len(data.methods) > MANY for data in grids) else 0.0
    figure = Figure(figsize=((6.4 + beside) * columns, 4.4 * rows), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, data in zip(panels, grids, strict=False):
        _panel(panel, data)
    for panel in panels[len(tasks) :]:
        panel.set_visible(False)
    figure.suptitle(_verbatim(str(results.run["model"]["name"])))
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _panel(panel: object, data: Grid) -> None:
    from matplotlib.axes import Axes

    assert isinstance(panel, Axes)
    panel.set_title(_verbatim(data.task))
    if data.baseline is None and not data.methods:
        panel.text(0.5, 0.5, "no cell is complete", ha="center", va="center", transform=panel.transAxes)
        panel.set_axis_off()
        return
    factor = 100.0 if data.percent else 1.0
    if data.baseline is not None:
        panel.axhline(data.baseline["value"] * factor, color="black", linewidth=1.2, linestyle="--", label="untouched")
        if data.baseline["ci_low"] is not None:
            low, high = data.baseline["ci_low"] * factor, data.baseline["ci_high"] * factor
            panel.axhspan(low, high, color="black", alpha=0.08, linewidth=0)
    names = short_names(data.methods)
    ticks = set()
    for number, method in enumerate(data.methods):
        lines = [data.entries[method, r] for r in data.retentions if (method, r) in data.entries]
        lines = [line for line in lines if line["visual_tokens_in"]]
        x = [100 * line["visual_tokens_kept"] / line["visual_tokens_in"] for line in lines]
        y = [line["value"] * factor for line in lines]
        look = style(number)
        panel.plot(x, y, **look, markersize=5, label=_verbatim(names[method]))
        if lines and len(data.methods) <= MANY and all(line["ci_low"] is not None for line in lines):
            low = [line["ci_low"] * factor for line in lines]
            high = [line["ci_high"] * factor for line in lines]
            panel.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)
        ticks |= {round(100 * line["retention"], 1) for line in lines if line["retention"] is not None}
    panel.set_xscale("log")
    if ticks:
        panel.set_xticks(sorted(ticks), [f"{tick:g} %" for tick in sorted(ticks)])
    else:
        panel.xaxis.set_major_formatter("{x:g} %")
    panel.minorticks_off()
    panel.set_xlabel("visual tokens entering an LLM layer (achieved)")
    panel.set_ylabel(f"{data.metric} (%)" if data.percent else data.metric)
    panel.grid(alpha=0.25)
    many = len(data.methods) > MANY
    place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if many else {}
    panel.legend(fontsize="small", frameon=False, handlelength=3.2, **place)
