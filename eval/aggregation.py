"""A task's aggregation functions as they are called here: with lmms-eval's arguments, and without after-effects.

Some write files for a server where `args.output_path` says, some count in a variable of their module, some ask a server
or start a program. A sweep scores many cells in one process and recomputes metrics on resamples, so files are
collected, modules get their variables back, and what goes outside is done once.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from vtc.eval.outside import Calls, watching
from vtc.eval.statistics import resamples


def arguments(task: str, output_path: str) -> argparse.Namespace:
    """What lmms-eval's own command line would hand over; `output_path` is the folder of side files."""
    return argparse.Namespace(
        output_path=output_path,
        process_with_media=False,  # scoring needs no pictures
        reasoning_tags=None,
        tasks=task,
        model="vtc",
        model_args="",
        gen_kwargs="",
        batch_size=1,
        device=None,
        limit=None,
        num_fewshot=None,
        predict_only=False,
        log_samples=False,
        log_samples_suffix="model_outputs",
        seed=[0, 1234, 1234, 1234],
        verbosity="WARNING",
    )


LONGEST = 60.0
"""Seconds that intervals and tests of one metric of a cell may take; it has none where one computation says more."""
COMPUTATIONS = 5
"""Of a metric in each resample: one for its interval, two each for the interval and the test of a difference."""


class Aggregation:
    """One aggregation function, as ``function(items) -> value``.

    `calls` is what it asked outside for, `seconds` what it took. Made by `aggregations`; side files go to the folder of
    its arguments.
    """

    def __init__(self, function: Callable[..., Any], given: argparse.Namespace) -> None:
        self.function, self.given = function, given
        self.takes_arguments = "args" in inspect.signature(function).parameters
        self.variables = variables(function)
        self.calls, self.seconds = Calls(), 0.0

    def __call__(self, items: Sequence[Any]) -> Any:
        began = time.perf_counter()
        with unchanged(self.variables), watching() as calls:
            value = self._aggregate(list(items), self.given)
        self.seconds = max(self.seconds, time.perf_counter() - began)
        self.calls.servers |= calls.servers
        self.calls.programs |= calls.programs
        return value

    def known(self, items: Sequence[Any], value: float) -> Callable[[list[Any]], float]:
        """The function for resamples, its `value` for all `items` being known already.

        Raises:
            RuntimeError: when called on other items, if the function goes outside or is slow.
        """
        expected = self.seconds * COMPUTATIONS * resamples(len(items))
        once, ids = bool(self.calls) or expected > LONGEST, [id(item) for item in items]

        def resampled(some: list[Any]) -> float:
            if [id(item) for item in some] == ids:
                return value
            if once:
                raise RuntimeError("a metric that asks a server, starts a program or is slow is computed once")
            with unchanged(self.variables):
                return float(self._aggregate(some, self.scratch))

        return resampled

    @cached_property
    def scratch(self) -> argparse.Namespace:
        """The arguments with a folder for what resamples write, which goes when the function goes."""
        if not self.takes_arguments:
            return self.given
        folder = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return argparse.Namespace(**{**vars(self.given), "output_path": folder})

    def _aggregate(self, items: list[Any], given: argparse.Namespace) -> Any:
        return self.function(items, args=given) if self.takes_arguments else self.function(items)


@contextmanager
def aggregations(lmms: Any, given: argparse.Namespace) -> Iterator[Mapping[str, Aggregation]]:
    """Inside this context lmms-eval aggregates the task `lmms` through the `Aggregation` of each metric."""
    original = lmms._aggregation_list
    wrapped = {metric: Aggregation(function, given) for metric, function in original.items()}
    lmms._aggregation_list = wrapped
    try:
        with unchanged(variables(lmms.config.process_results)):
            yield wrapped
    finally:
        lmms._aggregation_list = original


@contextmanager
def collecting(folder: Path | None) -> Iterator[str]:
    """A folder for side files. What lies there at the end replaces `folder`; nothing is left without one, or on errors.

    lmms-eval's sub-folder "submissions" is left out of the paths, because `folder` lies in one already.
    """
    with tempfile.TemporaryDirectory() as scratch:
        yield scratch
        files = [path for path in Path(scratch).rglob("*") if path.is_file()]
        if folder is None:
            return
        shutil.rmtree(folder, ignore_errors=True)
        for path in files:
            parts = path.relative_to(scratch).parts
            target = folder.joinpath(*parts[parts[0] == "submissions" and len(parts) > 1 :])
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, target)


@contextmanager
def unchanged(containers: Sequence[Any]) -> Iterator[None]:
    """Give lists, dicts and sets their content back afterwards."""
    before = [_copied(container) for container in containers]
    try:
        yield
    finally:
        for container, content in zip(containers, before, strict=True):
            if container != content:
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)


def _copied(container: Any) -> Any:
    try:
        return copy.deepcopy(container)
    except Exception:  # it holds a lock, a connection or the like, which nothing can give back
        return container


def variables(function: Any) -> list[Any]:
    """The module's lists, dicts and sets that a function, or one that it calls in its module, names."""
    found: dict[int, Any] = {}
    waiting, seen = [getattr(function, "func", function)], set[int]()
    while waiting:
        current = waiting.pop()
        if not isinstance(current, FunctionType) or id(current) in seen:
            continue
        seen.add(id(current))
        for name in _names(current.__code__):
            value = current.__globals__.get(name)
            if isinstance(value, FunctionType) and value.__module__ == current.__module__:
                waiting.append(value)
            elif type(value) in (dict, list, set):
                found[id(value)] = value
    return list(found.values())


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
