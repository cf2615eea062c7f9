"""One picture of a sweep: each method's metric against the visual tokens it really keeps, one panel per task."""

from __future__ import annotations

import io
import math

from vtc.eval.results import Results
from vtc.eval.tables import Grid, grid

# Okabe and Ito's colours, which stay apart for colour-blind readers, without the black of the baseline.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7F7F7F")
MARKERS = "osD^vPX*"
LINES = ("-", "--", ":")
"""Every round of the colours has its own kind of line."""
MANY = len(COLOURS)
"""Above so many methods the legend moves beside the panel and the bands, which would cover each other, go."""


def draw(results: Results) -> bytes:
    """The figure as PNG.

    The x axis is logarithmic and shows the achieved retention, kept over incoming visual tokens, so that methods that
    keep more than they were asked to stand further right. Bands are 95 % intervals, drawn for up to eight methods.
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
    figure.suptitle(str(results.run["model"]["name"]))
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _panel(panel: object, data: Grid) -> None:
    from matplotlib.axes import Axes

    assert isinstance(panel, Axes)
    panel.set_title(data.task)
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
    ticks = set()
    for number, method in enumerate(data.methods):
        lines = [data.entries[method, r] for r in data.retentions if (method, r) in data.entries]
        lines = [line for line in lines if line["visual_tokens_in"]]
        x = [100 * line["visual_tokens_kept"] / line["visual_tokens_in"] for line in lines]
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        y = [line["value"] * factor for line in lines]
        style = LINES[number // len(COLOURS) % len(LINES)]
        panel.plot(x, y, color=colour, linestyle=style, marker=marker, markersize=4.5, label=method)
        if lines and len(data.methods) <= MANY and all(line["ci_low"] is not None for line in lines):
            low = [line["ci_low"] * factor for line in lines]
            high = [line["ci_high"] * factor for line in lines]
            panel.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        ticks |= {round(100 * line["retention"], 1) for line in lines if line["retention"] is not None}
    panel.set_xscale("log")
    panel.set_xticks(sorted(ticks), [f"{tick:g} %" for tick in sorted(ticks)])
    panel.minorticks_off()
    panel.set_xlabel("visual tokens entering an LLM layer (achieved)")
    panel.set_ylabel(f"{data.metric} (%)" if data.percent else data.metric)
    panel.grid(alpha=0.25)
    if len(data.methods) > MANY:
        panel.legend(fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        panel.legend(fontsize="small", frameon=False)
