"""The document that helps to choose a method: what led in committed results, beside what the registry says of each.

Nothing is measured here. The scores are those of the packed sweep of tiny-onevision, the times those of
`docs/results/overhead.md`; what a method needs stands in its plan.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vtc.app.catalogue import describe_methods
from vtc.app.method_pages import overview
from vtc.app.pages import page, table, wrapped
from vtc.eval.cells import BASELINE
from vtc.eval.claims import CONTROLS, base_name
from vtc.eval.ranking import WHOLE
from vtc.eval.results import Asked, Results, asked
from vtc.eval.seeds import pools

BEST = 3
USES = {
    "tiny_detail": "documents, small details",
    "tiny_video": "video",
    "tiny_list": "long answers",
    "tiny_multi": "several pictures",
    "tiny_image": "one plain picture",
}
"""Tasks of the sweep -> what somebody may want to do."""

SHOWN = (0.5, 0.25)
"""Retentions of the tables."""

ABOUT = """the sweep of tiny-onevision in [results/ranking.md](results/ranking.md), the times in
[results/overhead.md](results/overhead.md), and the registry. The scores are those of an embedded model on synthetic
pictures and clips: they rank mechanisms there and promise nothing about another model. Take from here two or three
candidates, and let [a sweep on your own data](sweeps.md) decide."""

READING = """In brackets: the score in percent. Rows called "{random}" and "untouched" say what an arbitrary choice and
the whole prompt reach. A score over {questions} questions is uncertain by up to {noise:.0f} points, so neighbours are
rarely told apart; [results/claims.md](results/claims.md) has paired intervals. Methods inside the LLM cannot meet
small retentions, because the layers in front of them see every token; they are missing there."""

BLIND = """These read nothing inside the model: neither attention nor keys of any layer. They run beside any attention
kernel. The best of them, by use:"""

SERVER = """For a server it counts that the number of tokens is known beforehand and the same in every layer: then
batches stay rectangular, the cache is as short as the prompt, and `torch.compile` takes the language model whole. That
holds for methods that act before the LLM alone. They are listed by what their prefill took in a batch of four, as a
multiple of that of a prompt that is so short from the start (one run on a shared CPU), and by the milliseconds that the
host spent in the engine. [Serving](serving.md) says how to attach one."""

INSIDE = """{names} act inside the LLM, where they see the question with the model's own eyes, and pay for it with the
layers in front of their first stage, which see everything. What reads attention rows needs SDPA
([what is refused](engine.md#limits)); `vtc doctor --model NAME` says which methods a checkpoint of yours can run."""

CACHED = """{names} act after the prefill alone: they drop visual entries of the KV cache, so that memory and decoding
get cheaper and the prefill does not. The first answer token is the untouched model's. What stays is told by
`handle.stats.cache_retention` and, in sweeps, by `kv_share`. They combine with a method before the LLM."""

TRAINED = """{names} run on learned weights, which fit one model and one setting; [training](training.md) makes them.
Everything else is training-free."""


@dataclass(frozen=True)
class Task:
    """One task of a sweep: `scores` of each method in percent by budget."""

    name: str
    questions: int
    untouched: float
    scores: Mapping[str, Mapping[Asked, float]]

    def best(self, retention: Asked, among: Sequence[str]) -> list[str]:
        """Those of `among` with the highest scores at a retention, each with its score.

        >>> Task("t", 9, 90.0, {"a": {0.5: 50.0}, "b": {0.5: 70.0}, "c": {}}).best(0.5, ["a", "b", "c"])
        ['`b` (70.0)', '`a` (50.0)']
        """
        there = [name for name in among if retention in self.scores.get(name, {})]
        there.sort(key=lambda name: -self.scores[name][retention])
        return [f"`{name}` ({self.scores[name][retention]:.1f})" for name in there[:BEST]]


def tasks_of(results: Results) -> Iterator[Task]:
    """The scores of a sweep's main metrics, seeds of a method as one, without methods that leave the prompt whole."""
    for name in results.tasks:
        scores: dict[str, dict[Asked, float]] = {}
        for _, line in pools(results, name, results.main_metric(name)):
            if line["method"] != BASELINE and 100 * line["visual_tokens_kept"] >= WHOLE * line["visual_tokens_in"]:
                continue
            scores.setdefault(base_name(line["method"]), {})[asked(line)] = 100 * line["value"]
        (untouched,) = scores.pop(BASELINE).values()
        yield Task(name, results.run["tasks"][name]["documents"], untouched, scores)


def read_overhead(text: str) -> dict[str, tuple[float, float]]:
    """Method -> time over the limit's and engine milliseconds in a batch of four, of `python -m vtc.testing.overhead`.

    >>> read_overhead("| pool | 64 | 4 | 3618.4 | 634.6 | 594.8 | 1.07 | 1.03 | 22.05 |")
    {'pool': (1.07, 22.05)}
    """
    rows = re.findall(r"^\| (\w+) \| \d+ \| 4 \|(?: [\d.]+ \|){3} ([\d.]+) \| [\d.]+ \| ([\d.]+) \|$", text, re.M)
    return {name: (float(share), float(engine)) for name, share, engine in rows}


def choosing_page(sweep: Results, overhead_text: str) -> str:
    """The document, made of a sweep and of the text of `docs/results/overhead.md`."""
    entries = {entry["name"]: entry for entry in describe_methods() if entry["name"] not in CONTROLS}
    tasks = {task.name: task for task in tasks_of(sweep)}
    shown = [(use, tasks[name]) for name, use in USES.items()]
    blind = [name for name, entry in entries.items() if not entry["needs"]]
    least = min(task.questions for _, task in shown)
    reading = READING.format(random=CONTROLS[0], questions=least, noise=100 * 1.96 * math.sqrt(0.25 / least))
    trained = ", ".join(f"`{name}`" for name, entry in entries.items() if entry["trained"])
    inside = ", ".join(f"`{name}`" for name, entry in entries.items() if "llm" in entry["stages"])
    cached = ", ".join(f"`{name}`" for name, entry in entries.items() if entry["stages"] == ["after prefill"])
    overhead = read_overhead(overhead_text)
    return page(
        "Choosing a method",
        "python -m vtc.eval.documents",
        ABOUT,
        "## By what you do",
        _leaders(shown, list(entries)),
        wrapped(reading),
        "## Without access to attention",
        f"{wrapped(BLIND)}\n\n{_leaders(shown, blind)}",
        "## On a server",
        f"{wrapped(SERVER)}\n\n{_server(entries, overhead)}",
        "## Inside the LLM",
        wrapped(INSIDE.format(names=inside)),
        "## On the KV cache",
        wrapped(CACHED.format(names=cached)),
        "## With learned weights",
        wrapped(TRAINED.format(names=trained)),
        "## All methods",
        overview(describe_methods(), "methods.md"),
    )


def _leaders(shown: Sequence[tuple[str, Task]], among: Sequence[str]) -> str:
    rows: list[list[str]] = []
    for use, task in shown:
        rows.append([f"**{use}** ({task.name})", *(", ".join(task.best(r, among)) or "-" for r in SHOWN)])
        luck = task.scores[CONTROLS[0]]
        rows.append([f"{CONTROLS[0]}; untouched {task.untouched:.1f}", *(f"{luck[r]:.1f}" for r in SHOWN)])
    return table(["use (task)", *(f"at {retention}" for retention in SHOWN)], rows)


def _server(entries: Mapping[str, Mapping[str, Any]], overhead: Mapping[str, tuple[float, float]]) -> str:
    before = [name for name, entry in entries.items() if entry["stages"] == ["pre-llm"] and name in overhead]
    before.sort(key=lambda name: overhead[name])
    rows = [[f"`{name}`", f"{overhead[name][0]:.2f}", f"{overhead[name][1]:.1f}"] for name in before]
    return table(["method", "prefill / limit", "engine ms"], rows)
