"""lmms-eval tasks as a sweep sees them: documents, messages, generation settings and a fingerprint.

Tasks come from the embedded folder, from `include_path` folders and, for names found in neither, from lmms-eval itself
(indexing those takes seconds, so it happens only then).
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtc.app.images import pillow_defaults
from vtc.app.preparation import Chat
from vtc.errors import InputError, VTCError, one_line
from vtc.eval.data_map import DataMap, read_data_map
from vtc.eval.failures import FAULTS, TaskKey
from vtc.eval.fingerprint import task_fingerprint
from vtc.eval.generation import Generation, make_generation
from vtc.eval.local_data import LocalData
from vtc.eval.messages import Clips, conversation
from vtc.eval.outside import PATIENCE, Calls, watching
from vtc.eval.quiet import muted
from vtc.eval.store import Record
from vtc.eval.suite import GROUPS, expand
from vtc.eval.task_index import GENERATE, TaskIndex

if TYPE_CHECKING:
    from vtc.eval.scoring import Scored

_loading = threading.Lock()
"""lmms-eval reads task files by a loader that it changes for the whole process, with or without their functions."""


@dataclass(frozen=True)
class SweepTask:
    """One lmms-eval task, ready to be answered and scored. `lmms` is the task object that lmms-eval built.

    `local` are the files of a data map that its code works on, and where it finds its videos.
    """

    name: str
    lmms: Any
    profile: str = "default"
    local: LocalData | None = None

    @cached_property
    def documents(self) -> Any:
        """The evaluated documents, in the order of their ids."""
        return self.lmms.eval_docs

    def only(self, doc_ids: Sequence[int]) -> SweepTask:
        """The same task on these documents alone, which it numbers from 0 on; its fingerprint stays."""
        documents = self.documents
        some = documents.select(doc_ids) if hasattr(documents, "select") else [documents[i] for i in doc_ids]
        lmms = copy.copy(self.lmms)
        for split in ("test", "validation"):
            for name in (f"{split}_docs", f"{split}_docs_no_media"):
                setattr(lmms, name, lambda: some)
        part = replace(self, lmms=lmms)
        part.__dict__["fingerprint"] = self.fingerprint
        return part

    @property
    def repeats(self) -> int:
        """How often each question is asked; more than once only for sampling tasks."""
        return int(self.lmms.config.repeats or 1)

    @property
    def version(self) -> str:
        """The version that the task's author gave it."""
        return str(self.lmms.VERSION)

    @property
    def main_metric(self) -> str:
        """The first metric that the task declares."""
        return str(next(iter(self.lmms.aggregation())))

    def settings(self, overrides: Mapping[str, Any]) -> Record:
        """How it is asked, for `run.json`."""
        generation = self.generation(overrides)
        return {
            "cluster_key": self.lmms.config.cluster_key,
            "prompt_profile": self.profile,
            "generation": {name: value for name, value in generation.arguments.items() if value is not None},
            "until": list(generation.until),
        }

    def target(self, doc_id: int) -> str:
        """The right answer to a document."""
        return str(self.lmms.doc_to_target(self.documents[doc_id]))

    def scored(self, rows: Sequence[Record], documents: int, side_files: Path | None = None) -> dict[str, Scored]:
        """The metrics of one cell, see `vtc.eval.scoring.score`."""
        from vtc.eval.scoring import score  # which is made of tasks

        return score(self, rows, documents, side_files)

    def conversation(self, doc_id: int, clips: Clips | None = None) -> Chat:
        """The chat messages of one document, with its pictures and videos opened, see `vtc.eval.messages`.

        Raises:
            InputError: the document carries audio, or a picture or video that cannot be read.
        """
        with pillow_defaults(), self._surroundings():
            messages = self.lmms.doc_to_messages(self.documents[doc_id])
            return conversation(messages, f"task {self.name!r}, document {doc_id}", clips)

    def _surroundings(self) -> AbstractContextManager[None]:
        return nullcontext() if self.local is None else self.local.surroundings()

    def probe(self, clips: Clips | None = None) -> Chat:
        """Read the first question, so that a task whose documents cannot be used is refused before a sweep begins.

        Raises:
            InputError: they cannot; the message says why, and which servers did not answer.
        """
        with watching(patience=PATIENCE) as calls:
            try:
                return self.conversation(0, clips)
            except InputError as error:
                if not calls.unreachable:
                    raise
                raise InputError(f"{one_line(error)}{_not_reached(calls)}") from error
            except FAULTS as error:  # some tasks leave the process where a video is missing
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                sought = self.local.sought if self.local is not None else ""
                where = f"; videos lie in {sought}, or in the `media` of a --data-map" if sought else ""
                raise InputError(
                    f"task {self.name!r}: its first question cannot be read: {reason}{where}{_not_reached(calls)}"
                ) from error

    def generation(self, overrides: Mapping[str, Any]) -> Generation:
        """How answers are generated: the task's settings, then `overrides`."""
        declared = self.lmms.config.generation_kwargs or {}
        # lmms-eval fills in the few-shot delimiter where a task names no stop strings; its own chat models ignore it.
        implicit = declared.get("until") == [self.lmms.config.fewshot_delimiter]
        own = {key: value for key, value in declared.items() if not (key == "until" and implicit)}
        return make_generation({**own, **overrides}, source=f"task {self.name!r}")

    @property
    def key(self) -> TaskKey:
        """Name and fingerprint."""
        return TaskKey(self.name, self.fingerprint)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the task's settings, the code of its functions or its data."""
        local = () if self.local is None else self.local.files
        return task_fingerprint(vars(self.lmms.config), self.documents, self.profile, local)


def load_tasks(
    names: Sequence[str],
    include_path: Sequence[Path] = (),
    profile: str = "default",
    data_map: Path | Mapping[str, Any] | None = None,
) -> list[SweepTask]:
    """Load the tasks called `names`, groups and tags expanded, each once, in this order.

    data_map: local files in place of data sets (`vtc.eval.data_map`).

    Raises:
        UnknownName: a name that no folder knows, with near matches.
        InputError: a task that is not generate_until, whose data are missing, or whose code fails to load; a data map
            that cannot be used.

    >>> (task,) = load_tasks(["tiny_image"])
    >>> task.main_metric, len(task.documents)
    ('accuracy', 720)
    """
    with _loading:
        return _load_tasks(names, include_path, profile, read_data_map(data_map))


def _load_tasks(names: Sequence[str], include_path: Sequence[Path], profile: str, mapping: DataMap) -> list[SweepTask]:
    wanted = expand(names)
    asked = [*(name for name, _ in wanted), *(name for name in mapping.names if name not in GROUPS)]
    index = TaskIndex(include_path, profile, defaults=False)
    if not set(asked) <= set(index.names):
        local = index.names
        index = TaskIndex(include_path, profile, defaults=True)
        for name in asked:
            if name not in index.names:
                raise index.unknown(name, local)
    mapped = index.branches(expand(mapping.names))
    tasks: dict[str, SweepTask] = {}
    for name, groups in index.branches(wanted).items():
        _check_output_type(name, index.output_type(name))
        path = list(dict.fromkeys([name, *groups, *mapped.get(name, ())]))
        data = LocalData(path, index.settings(name), mapping)
        for leaf, lmms in _leaves(_load(index, name, data)):
            _check_output_type(leaf, lmms.OUTPUT_TYPE)
            tasks.setdefault(leaf, SweepTask(leaf, lmms, profile, data))
    return list(tasks.values())


def _check_output_type(name: str, output_type: str) -> None:
    if output_type != GENERATE:
        raise InputError(
            f"task {name!r} is of type {output_type}; a sweep answers {GENERATE} tasks, which `vtc tasks --all` lists"
        )


def root_cause(error: BaseException) -> BaseException:
    """What went wrong in a task's code behind lmms-eval's "five tries failed"."""
    from tenacity import RetryError

    return error.last_attempt.exception() or error if isinstance(error, RetryError) else error


def _load(index: TaskIndex, name: str, data: LocalData) -> Mapping[Any, Any]:
    from lmms_eval.tasks import get_task_dict

    with muted(), watching(patience=PATIENCE) as calls, data.redirected():
        try:
            loaded: Mapping[Any, Any] = get_task_dict([name], index.manager, "chat")
            return loaded
        except FAULTS as error:
            cause = root_cause(error)
            if isinstance(cause, VTCError):
                raise cause from None
            reason = " ".join(f"{type(cause).__name__}: {cause}".split())
            text = f"task {name!r} cannot be loaded here: "
            if not data.asked:
                raise InputError(f"{text}{reason}{_not_reached(calls)}") from error
            raise InputError(
                f"{text}its code loads {data.asked}, which is not on this machine"
                f"{_not_reached(calls) or ': ' + reason}; name a copy in a --data-map, as '{data.remedy}'"
            ) from error


def _not_reached(calls: Calls) -> str:
    return f" and {', '.join(calls.unreachable)} cannot be reached" if calls.unreachable else ""


def _leaves(loaded: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for name, entry in loaded.items():
        if isinstance(entry, Mapping):
            yield from _leaves(entry)
        else:
            yield str(name), entry[1] if isinstance(entry, tuple) else entry


def list_tasks(include_path: Sequence[Path] = (), *, everything: bool = False) -> list[dict[str, str]]:
    """The tasks, groups and tags that a sweep can name, sorted: ``{"name", "kind", "folder"}`` each.

    Only local ones unless `everything`, which adds the generate_until tasks of lmms-eval; most of those need data from
    the hub.

    >>> next(task["kind"] for task in list_tasks() if task["name"] == "tiny_image")
    'task'
    """
    with _loading:
        return TaskIndex(include_path, defaults=everything).listed()


def task_details(name: str, include_path: Sequence[Path] = ()) -> dict[str, str]:
    """What the file of a task, group or tag says that it needs; lmms-eval's own are looked up where no local one fits.

    Raises:
        UnknownName: there is none of this name.
    """
    with _loading:
        index = TaskIndex(include_path, defaults=False)
        local = index.names
        if name not in local:
            index = TaskIndex(include_path, defaults=True)
        if name not in index.names:
            raise index.unknown(name, local)
        return index.details(name)
