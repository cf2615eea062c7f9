"""Stored answers -> metrics, by lmms-eval's own code.

`evaluator.evaluate` runs on a model that replays the stored answers, so that filters, `process_results` and aggregation
are those of a plain lmms-eval run. Answering and scoring are separate: a new metric never costs a second generation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from vtc.errors import InputError, VTCError
from vtc.eval.aggregation import Aggregation, aggregations, arguments, collecting
from vtc.eval.asked import Scorable
from vtc.eval.catalogue import SweepTask
from vtc.eval.columns import Measured, scored_columns
from vtc.eval.quiet import muted
from vtc.eval.statistics import Outcomes, Paired, interval, paired
from vtc.eval.store import Record

VERSION = 3
"""Raised whenever the same answers may give other metrics, intervals or comparisons, or more columns are stored.

Version 0 is that of stores that name none.
"""


def scoring_of(task_fingerprint: str) -> Record:
    """What metrics depend on besides the answers, as stored with them: metrics of two scorings are not compared.

    The fingerprint covers the task's YAML and the code it names.
    """
    try:
        lmms_eval = metadata.version("lmms-eval")
    except metadata.PackageNotFoundError:
        lmms_eval = "not installed"
    return {"version": VERSION, "lmms-eval": lmms_eval, "task": task_fingerprint}


@dataclass(frozen=True)
class Scored:
    """One metric of one cell: `value` as the task aggregates it, over the documents `doc_ids` (N) that have it.

    better: whether higher values are better.
    """

    value: float
    doc_ids: tuple[int, ...]
    outcomes: Outcomes
    better: bool = True


class NotScored(InputError):
    """A task without a metric that is a number."""


class NotFinite(VTCError):
    """A metric that is NaN or infinite."""


def score(task: SweepTask, rows: Sequence[Record], documents: int, side_files: Path | None = None) -> dict[str, Scored]:
    """The metrics of one cell from its answers to the first `documents` documents, by name.

    A metric under a filter other than lmms-eval's default is called ``metric,filter``. Metrics whose aggregate is not a
    number (predictions written to a file for a server, for instance) are left out. What the task's code writes beside
    its numbers replaces the folder `side_files`; without one it is thrown away.

    Raises:
        NotScored: no metric is a number.
        NotFinite: a metric is NaN or infinite.
        Exception: whatever the task's scoring code raises.
    """
    replay = _replay({(row["doc_id"], row["repeat"]): row["text"] for row in rows})
    with muted():
        from lmms_eval.evaluator import evaluate

    with collecting(side_files) as output, muted():
        given = arguments(task.name, output)
        with aggregations(task.lmms, given) as aggregated:
            result = evaluate(
                lm=replay,
                task_dict={task.name: task.lmms},
                limit=documents,
                bootstrap_iters=0,
                process_docs_parallel=1,
                cli_args=given,
            )
    samples = result["samples"][task.name]
    values = {k: v for k, v in result["results"][task.name].items() if "," in k and "_stderr" not in k}
    filters = list(dict.fromkeys(key.split(",", 1)[1] for key in values))
    declared, better = list(task.lmms.aggregation()), task.lmms.higher_is_better()
    scored = {}
    for key, value in sorted(values.items(), key=lambda entry: _position(declared, entry[0].split(",")[0])):
        metric, name = key.split(",", 1)
        if isinstance(value, Real) and metric in declared:
            start = filters.index(name) * documents
            having = [sample for sample in samples[start : start + documents] if metric in sample]
            label = metric if name == "none" else key
            scored[label] = Scored(
                float(value),
                tuple(s["doc_id"] for s in having),
                _outcomes(task, aggregated[metric], metric, having, float(value)),
                bool(better.get(metric, True)),
            )
    _check(task, values, scored)
    return scored


def _check(task: SweepTask, values: Mapping[str, Any], scored: Mapping[str, Scored]) -> None:
    if not scored:
        declared = task.lmms.aggregation()
        found = {key.split(",")[0]: type(value).__name__ for key, value in values.items()}
        kinds = ", ".join(f"{metric} is {kind}" for metric, kind in found.items() if metric in declared)
        raise NotScored(
            f"task {task.name!r} has no metric that is a number ({kinds or 'no metric has a value'}), so cells "
            "cannot be compared on it; choose a split whose answers are public"
        )
    wrong = [f"{metric} is {entry.value}" for metric, entry in scored.items() if not math.isfinite(entry.value)]
    if wrong:
        raise NotFinite(
            f"task {task.name!r}: {', '.join(wrong)}, which cannot be compared; ask more questions of it, or mend the "
            "metric"
        )


def _position(declared: Sequence[str], metric: str) -> int:
    return declared.index(metric) if metric in declared else len(declared)


def _replay(texts: Mapping[tuple[int, int], str]) -> Any:
    with muted():
        import torch
        from lmms_eval.api.model import lmms

    class Replay(lmms):  # type: ignore[misc]
        """Answers every request with the stored text."""

        is_simple = False
        accelerator = None

        def clean(self) -> None:
            """Nothing to free."""

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            asked: Counter[int] = Counter()
            answers = []
            for request in requests:
                doc_id = request.args[3]
                answers.append(texts[doc_id, asked[doc_id]])
                asked[doc_id] += 1
            return answers

        def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
            raise NotImplementedError

        def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
            raise NotImplementedError

    replay = Replay()
    replay.device = torch.device("cpu")
    return replay


def _outcomes(
    task: SweepTask, aggregation: Aggregation, metric: str, samples: Sequence[Mapping[str, Any]], value: float
) -> Outcomes:
    """The documents' outcomes in `metric`, which aggregate to `value`."""
    score_key, cluster_key = task.lmms.config.score_key, task.lmms.config.cluster_key
    items = [sample[metric] for sample in samples]
    aggregate = aggregation.known(items, value)
    numbers = [item.get(score_key) if isinstance(item, Mapping) else item for item in items]
    scores, scale = None, 1.0
    if all(isinstance(number, Real) for number in numbers):
        candidate = np.array(numbers, dtype=np.float64)
        for factor in (1.0, 100.0):
            if np.isclose(value, factor * candidate.mean(), rtol=1e-9, atol=1e-12):
                scores, scale = candidate, factor
                break
        if scores is not None and not candidate.any():
            scale = _scale_from_a_hit(aggregate, items, score_key)
    clusters = None
    if cluster_key:
        named = [_cluster(item, sample, cluster_key) for item, sample in zip(items, samples, strict=True)]
        clusters = named if all(cluster is not None for cluster in named) else None
    return Outcomes(items, aggregate, scores, scale, clusters)


def _scale_from_a_hit(aggregate: Any, items: Sequence[Any], score_key: str) -> float:
    """Whether a metric counts to 1 or to 100, which scores that are all zero do not tell."""
    hits = [{**item, score_key: 1.0} if isinstance(item, Mapping) else 1.0 for item in items]
    try:
        return 100.0 if np.isclose(float(aggregate(hits)), 100.0) else 1.0
    except Exception:  # the task's own code, on outcomes it did not make
        return 1.0


def _cluster(item: Any, sample: Mapping[str, Any], cluster_key: str) -> Hashable | None:
    cluster = item.get(cluster_key) if isinstance(item, Mapping) else None
    cluster = sample["doc"].get(cluster_key) if cluster is None else cluster
    return cluster if cluster is None else str(cluster)


def metric_records(
    task: Scorable,
    cell: str,
    documents: int,
    rows: Sequence[Record],
    baseline: Mapping[str, Scored] | None,
    folder: Path | None = None,
) -> tuple[dict[str, Scored], list[Record]]:
    """Score one cell and describe each metric as a line of `metrics.jsonl`.

    `rows` are the cell's answers to the first `documents` documents; `baseline` the scored baseline to compare with,
    None for the baseline itself or where it is incomplete. Side files of the task's scoring, such as submissions to a
    server, go to ``folder/submissions/CELL/TASK``.
    """
    scored = task.scored(rows, documents, folder and folder / "submissions" / cell / task.name)
    about = {"cell": cell, "task": task.name, "task_fp": task.fingerprint, "documents": documents}
    about |= {"scoring": scoring_of(task.fingerprint)}
    records = []
    for metric, result in scored.items():
        if not result.doc_ids:
            continue
        with muted():  # the task's code may speak on every resample
            ends = interval(result.outcomes)
            against = _against(result, baseline.get(metric)) if baseline is not None else None
        measured = Measured(result.value, result.doc_ids, ends, against, result.better, rows)
        records.append({**about, "metric": metric, **scored_columns(measured), **_by_document(result, rows)})
    return scored, records


def _by_document(result: Scored, rows: Sequence[Record]) -> Record:
    """What comparisons need of each document; all but `seconds` are None for a metric that is not a mean.

    `scores` by document, whose mean times `scale` is the metric, and in the same order `clusters` as numbers (None
    without) and `kept`, the visual tokens entering a layer (None where the answers do not tell). `seconds`: mean of an
    answer's share of the time of its batch; no two runs agree on it, so it is no column.
    """
    outcomes = result.outcomes
    spent = [row["seconds"] for row in rows if row.get("seconds") is not None]
    seconds = sum(spent) / len(spent) if spent else None
    if outcomes.scores is None:
        return {"scores": None, "scale": None, "clusters": None, "kept": None, "seconds": seconds}
    numbers: dict[Hashable, int] = {}
    clusters = None if outcomes.clusters is None else [numbers.setdefault(c, len(numbers)) for c in outcomes.clusters]
    kept: dict[int, list[float]] = {}
    for row in rows:
        if row.get("visual_tokens_kept") is not None:
            kept.setdefault(row["doc_id"], []).append(row["visual_tokens_kept"])
    known = all(doc_id in kept for doc_id in result.doc_ids)
    return {
        "scores": dict(zip(map(str, result.doc_ids), outcomes.scores.tolist(), strict=True)),
        "scale": outcomes.scale,
        "clusters": clusters,
        "kept": [sum(kept[doc_id]) / len(kept[doc_id]) for doc_id in result.doc_ids] if known else None,
        "seconds": seconds,
    }


def _against(ours: Scored, theirs: Scored | None) -> Paired | None:
    if theirs is None or ours.doc_ids != theirs.doc_ids:
        return None
    return paired(ours.outcomes, theirs.outcomes)
