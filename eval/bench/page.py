"""The files people read: `bench.csv`, `bench.md`, `bench.png`, `bench.html`; and the section of a sweep's report."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtc.app.pages import page as document
from vtc.app.pages import table as markdown
from vtc.app.pages import wrapped
from vtc.eval.bench import figures
from vtc.eval.bench.arms import UNTOUCHED
from vtc.eval.bench.parts import PARTS
from vtc.eval.bench.record import Record, SceneRecord
from vtc.eval.bench.summary import LLM, Line, Spread, bound, break_even, lines, spread, table, taken
from vtc.eval.charts import picture
from vtc.eval.page import Page
from vtc.eval.writing import write_files

DASH = "-"
NOTES = (
    "All arms run in turn in one process, round by round, each round beginning with another one; warm-up rounds are "
    "dropped and garbage is not collected meanwhile. Every figure is the median of the rounds, with the quartiles in "
    "brackets; ratios are taken round by round. Parts are medians of their own, so their sum differs a little from the "
    "median of the total. A dash stands where something does not apply.",
    "vision holds what a method reads or drops in the tower, prefill what it reads inside layers; selection is the "
    "rest of the engine's work. A limit is the same language model on embeddings that are as short from the start as "
    "the compressed prompt is in the mean over the layers; its pictures are encoded as well. LLM / limit compares "
    "selection and prefill, first token / limit everything from the bytes of the picture on. Attaching a method is "
    "not part of a request.",
)


def write_bench(record: Record, folder: Path, command: str = "vtc bench") -> None:
    """Write all of them into `folder`; command: that made them, as documents name it.

    Raises:
        InputError: one cannot be written.
    """
    content = {
        "bench.csv": _csv(table(record)).encode(),
        "bench.md": report(record, command).encode(),
        "bench.png": picture(figures.figure(record), "png"),
        "bench.html": _html(record).encode(),
    }
    write_files(folder, content)


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]) if rows else ["model"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _html(record: Record) -> str:
    page = Page()
    title = f"Measured efficiency of {record.machine['title']}"
    return page.render("bench.html", title=title, bench=section(page, record))


def section(page: Page, record: Record) -> dict[str, Any]:
    """What the template `bench_section.html` shows; charts are added to `page`."""
    boards = [
        {"name": str(scene.batch), "chart": page.chart(figures.bars(scene))}
        for scene in record.main.values()
        if scene.rounds
    ]
    return {
        "about": about(record),
        "warning": cut(record),
        "left_out": left_out(record),
        "boards": boards,
        "tables": [
            {"name": f"batch {scene.batch}", "parts": parts_table(scene), "outcome": outcome_table(scene)}
            for scene in record.main.values()
            if scene.rounds
        ],
        "ceilings": ceilings(record),
        "curves": page.chart(figures.curves(record)) if len(record.curve) > 1 else None,
        "break_even": [(each.arm, each.words) for each in break_even(record)],
        "notes": NOTES,
    }


# --- words
def about(record: Record) -> str:
    """Everything that the figures depend on, in one paragraph."""
    machine, spec = record.machine, record.spec
    weights = f"random weights, {machine['source']}" if machine["weights"] == "random" else "checkpoint"
    attention = " and ".join(f"{name} {kind}" for name, kind in machine["attention"].items())
    scene = next(iter(record.main.values()), None)
    prompt = "" if scene is None else f"{scene.visual:g} visual and {scene.text} text tokens, "
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("torch", "transformers"))
    model = f"{machine['title']} ({machine['class']}, {weights})"
    sizes = f"{_count(spec.load.pictures, 'picture')} of {spec.load.width} x {spec.load.height} pixels"
    return (
        f"{model} on {machine['device']}, {machine['dtype']}, attention: {attention}, "
        f"{_count(machine['threads'], 'thread')}. Each request: {sizes}, {prompt}"
        f"{_count(spec.new_tokens, 'new token')}. {_count(spec.repeats, 'round')}. {versions}. {spec.note}".rstrip()
    )


def cut(record: Record) -> str | None:
    """A warning where the model lacks layers; None where it is whole."""
    layers, of = record.machine["layers"], record.machine["of_layers"]
    if layers == of:
        return None
    return (
        f"Measured with {layers} of {of} LLM layers: no time, memory or ratio here is one of the whole model, whose "
        "language model weighs more beside its vision tower."
    )


def left_out(record: Record) -> list[str]:
    """Methods that were not measured, each with its reason, and scenes that lack rounds."""
    found = list(dict.fromkeys(line for scene in record.scenes.values() for line in scene.left_out))
    for key, scene in record.scenes.items():
        if len(scene.rounds) < record.spec.repeats:
            found.append(f"{key}: {len(scene.rounds)} of {record.spec.repeats} rounds are finished")
    return found


def ceilings(record: Record) -> list[str]:
    """What no method that acts behind the vision tower can exceed, a line per batch size."""
    found = []
    for scene in record.main.values():
        first = bound(scene, "first_token", LLM) if scene.rounds else None
        whole = bound(scene, "total", [*LLM, "decode"]) if scene.rounds else None
        if first is not None and whole is not None:
            found.append(
                f"batch {scene.batch}: if the language model took no time at all, the first token would come "
                f"{first.median:.2f} times and the whole request {whole.median:.2f} times as fast as untouched"
            )
    return found


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


# --- tables
Cells = tuple[list[str], list[list[str]]]


def parts_table(scene: SceneRecord) -> Cells:
    """Milliseconds of each part."""
    head = ["arm", *(f"{part}" for part in PARTS), "total, ms", "attach", "engine (host)"]
    rows = []
    for line in lines(scene):
        cells = [_plain(line.values[part], 1000) for part in PARTS]
        ends = [_plain(line.values[name], 1000) for name in ("attach", "engine")]
        rows.append([line.arm, *cells, _spread(line.values["total"], 1000), *ends])
    return head, rows


def outcome_table(scene: SceneRecord) -> Cells:
    """What a request costs, and how it stands to the untouched model and to the limit."""
    head = [
        "arm", "visual tokens", "first token, ms", "per token, ms", "speed-up", "LLM / limit", "first token / limit",
        "KV MB", "memory beyond rest, MB", "requests/s", "tokens/s",
    ]  # fmt: skip
    rows = []
    for line in lines(scene):
        facts = scene.arms[line.arm]
        rows.append([
            line.arm, f"{facts.visual:g}", _spread(line.values["first_token"], 1000),
            _spread(line.values["per_token"], 1000), _speedup(line), _spread(line.values["llm_to_limit"]),
            _spread(line.values["first_token_to_limit"]), f"{facts.kv_bytes / 1e6:.2f}",
            _plain(line.values["working_bytes"], 1e-6), _plain(line.values["requests"]), _plain(line.values["tokens"]),
        ])  # fmt: skip
    return head, rows


def _speedup(line: Line) -> str:
    return "1" if line.arm == UNTOUCHED else _spread(line.values["speedup"])


def _plain(value: Spread | None, factor: float = 1) -> str:
    return DASH if value is None else _figure(value.median * factor)


def _spread(value: Spread | None, factor: float = 1) -> str:
    if value is None:
        return DASH
    ends = f"{_figure(value.low * factor)} to {_figure(value.high * factor)}"
    return f"{_figure(value.median * factor)} ({ends})"


def _figure(value: float) -> str:
    """Three digits, whole numbers beyond.

    >>> _figure(1234.5), _figure(12.345), _figure(0.012345)
    ('1234', '12.3', '0.0123')
    """
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


# --- the document
def report(record: Record, command: str) -> str:
    """The bench as a Markdown document."""
    parts: list[Any] = [wrapped(f"**{warning}**")] if (warning := cut(record)) is not None else []
    for scene in record.main.values():
        if scene.rounds:
            parts += [f"## Batch {scene.batch}", outcome_table(scene), "Milliseconds by part:", parts_table(scene)]
    if found := ceilings(record):
        parts += ["## Ceiling", _listed(found)]
    if found := [f"`{each.arm}` {each.words}" for each in break_even(record)]:
        parts += ["## Break-even", _break_even_words(), _break_even_table(record), _listed(found)]
    if found := left_out(record):
        parts += ["## Left out", _listed(found)]
    parts += ["## How to read this", *map(wrapped, NOTES)]
    return document(f"Efficiency of {record.machine['title']}", command, about(record), *parts)


def _break_even_words() -> str:
    return wrapped(
        "Vision tower, selection and prefill together, batch 1: milliseconds saved against the untouched model, which "
        "takes what stands in its row. The tower's own time is the least that anything behind it can reach."
    )


def _break_even_table(record: Record) -> str:
    scenes = record.curve
    head = ["visual tokens", *(f"{scene.visual:g}" for scene in scenes)]
    rows = []
    for name, arm in (("vision tower alone", ["vision"]), (UNTOUCHED, ["vision", *LLM])):
        cells = [_spread(spread(taken(scene, UNTOUCHED, arm)), 1000) for scene in scenes]
        rows.append([name, *cells])
    for each in break_even(record):
        points = dict(each.points)
        rows.append([f"saved by {each.arm}", *(_spread(points.get(scene.visual), 1000) for scene in scenes)])
    return markdown(head, rows)


def _listed(found: Sequence[str]) -> str:
    return "\n".join(f"- {line}." for line in found)
