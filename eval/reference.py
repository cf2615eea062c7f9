"""Pages of the API reference for mkdocstrings: what is public, and where it stands.

The names of `vtc` are those of `vtc.__all__`, the methods those of the registry. Of the evaluation package the names in
`PUBLIC` are meant for users; the rest may change without notice. Each has an example that the tests run.
"""

from __future__ import annotations

from collections.abc import Iterable

import vtc
from vtc.app.pages import page
from vtc.method.registry import METHODS

PUBLIC: dict[str, tuple[str, ...]] = {
    "vtc.eval.spec": ("SweepSpec", "make_spec"),
    "vtc.eval.series": ("make_series",),
    "vtc.eval.sweep": ("run_sweep", "SweepResult"),
    "vtc.eval.results": ("read_results", "Results"),
    "vtc.eval.report": ("write_report",),
    "vtc.eval.compare": ("compare",),
    "vtc.eval.rescoring": ("rescore",),
    "vtc.eval.catalogue": ("list_tasks", "load_tasks"),
    "vtc.eval.data_map": ("read_data_map",),
    "vtc.eval.ledger": ("read_ledger",),
    "vtc.eval.bench.spec": ("BenchSpec",),
    "vtc.eval.bench.run": ("bench",),
    "vtc.eval.training.settings": ("TrainingSettings",),
    "vtc.eval.training.trainer": ("train",),
}
"""Modules of the evaluation package -> what users call of them."""


SESSION = """
>>> from pathlib import Path
>>> from vtc.eval.compare import compare
>>> from vtc.eval.report import write_report
>>> from vtc.eval.rescoring import rescore
>>> from vtc.eval.results import Results, read_results
>>> from vtc.eval.spec import SweepSpec
>>> from vtc.eval.sweep import SweepResult, run_sweep
>>> spec = SweepSpec(methods=["random", "vtc_cls"], retentions=[0.25], limit=4, out=Path("results/first"))
>>> result: SweepResult = run_sweep(spec)  # the untouched model is always asked as well
>>> result.answered, result.failures
(12, [])
>>> result.frame.query("metric == 'accuracy'")[["method", "visual_tokens_kept"]].values.tolist()
[['none', 144.0], ['random', 36.0], ['vtc_cls', 36.0]]
>>> results: Results = read_results(result.folder)  # the same from the folder, at any time
>>> [line["method"] for line in results.select("tiny_image", "accuracy")]
['none', 'random', 'vtc_cls']
>>> rescore(result.folder)  # metrics from the stored answers, without a model; the failures of tasks' code
[]
>>> write_report(result.folder).tasks  # report.html, tables and figures from the store
['tiny_image']
>>> sorted({row.method for row in compare(result.folder, result.folder).rows})
['none', 'random', 'vtc_cls']

""".strip("\n")
"""What a script does with a sweep; the tests run it."""


def _entries(names: Iterable[str]) -> str:
    return "\n\n".join(f"::: {name}" for name in names)


def core_page() -> str:
    """The names of the package `vtc`."""
    return page("vtc", "python -m vtc.eval.documents", "the names in `vtc.__all__`.", _entries(_core()))


def _core() -> list[str]:
    return [f"vtc.{name}" for name in vtc.__all__]


def methods_page() -> str:
    """The classes of all methods."""
    classes = [METHODS.get(name) for name in METHODS.names() if METHODS.get(name).__module__.startswith("vtc.")]
    about = "the registry. [Methods](../methods.md) has the same texts with what each does on every family."
    return page(
        "Methods",
        "python -m vtc.eval.documents",
        about,
        _entries(f"{cls.__module__}.{cls.__qualname__}" for cls in classes),
    )


def eval_page() -> str:
    """What is public of the evaluation package."""
    about = "`vtc.eval.reference.PUBLIC`. What else lies in `vtc.eval` may change without notice."
    names = (f"{module}.{name}" for module, found in PUBLIC.items() for name in found)
    parts = ["## A sweep in a script", f"```python\n{SESSION}\n\n```", "## Names", _entries(names)]
    return page("vtc.eval", "python -m vtc.eval.documents", about, *parts)
