"""Evaluation: sweep methods x retentions over lmms-eval tasks, score the answers and draw the report.

The modules, in the order in which a sweep uses them::

    spec.py        what the user asks for, from options or a YAML file; method_spec.py: its methods
    cells.py       one cell = one method with its hyper-parameters at one retention, and its key
    catalogue.py   lmms-eval tasks: documents and messages; fingerprint.py and generation.py go with it
    task_index.py  which tasks there are; suite.py: the benchmark groups
    data_map.py    local files in place of data sets; local_data.py, local_rows.py: how a task comes to see them
    outside.py     what tasks ask of servers and programs; scoped.py: replacements for some threads
    runner.py      a cell answers messages through vtc.app.answer, with or without compression
    store.py       the append-only record of all answers; seen.py: which there are, and where
    plan.py        which answers are missing
    answering.py   a worker: items in, answers or failures out; station.py, facts.py: all that one process needs for it
    execute.py     the loop that hands out items and writes what comes back
    workers.py     workers in processes of their own; cluster.py: those that Ray places
    scoring.py     answers -> metrics, by lmms-eval's own code
    statistics.py  intervals and paired tests
    columns.py     the columns of the results; rescoring.py: metrics that lack or are of another scoring
    samples.py     pictures and questions of a few documents, for the report
    results.py, seeds.py, answers.py               a store as lines, seeds of a method as one, scores by document
    comparisons.py, difficulty.py                  what follows from them
    compare.py, matching.py                        two sweeps side by side; which of their cells are the same
    charts.py, curves.py, page.py                  Vega-Lite specifications, and pages that draw them
    tables.py, files.py, report.py, compare_report.py    tables, figures and reports
    ledger.py      published figures; ledger_check.py: a finished sweep against them
    sweep.py, lmms_model.py                        the ways in

Importing this package imports none of them: lmms-eval, datasets and statsmodels are loaded where they are used.

>>> from vtc.eval.spec import SweepSpec
>>> SweepSpec(model="tiny-llava", limit=24).retentions
(1.0, 0.5, 0.33, 0.22, 0.11, 0.05)
"""

from __future__ import annotations

from pathlib import Path

TASKS = Path(__file__).parent / "tasks"
"""Folder of the tasks that ship."""
CONFIGS = Path(__file__).parent / "configs"
"""Folder of the sweeps that ship."""
