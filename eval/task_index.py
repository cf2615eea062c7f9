"""Which tasks there are and where: the names that lmms-eval's `TaskManager` knows, without running their code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vtc.errors import InputError, UnknownName
from vtc.eval import TASKS
from vtc.eval.quiet import muted

GENERATE = "generate_until"
PLAIN_GROUP = {"group", "task", "metadata", "group_alias", "aggregate_metric_list"}
"""What a group's file may hold without giving its tasks settings of their own."""


class TaskIndex:
    """Tasks, groups and tags of the embedded folder and of `include_path`, and with `defaults` those of lmms-eval.

    `profile` is the model whose prompts are used where a task has several.
    """

    def __init__(self, include_path: Sequence[Path], profile: str = "default", *, defaults: bool) -> None:
        for folder in include_path:
            if not folder.is_dir():
                raise InputError(
                    f"include path {str(folder)!r} is not a folder; write a folder that holds task YAML files"
                )
        with muted():
            import datasets.config
            from lmms_eval.tasks import TaskManager

            # Else every load of a local parquet or json file counts itself at a server, which delays machines without.
            datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
            folders = [str(folder) for folder in (*include_path, TASKS) if folder.is_dir()]
            self.manager = TaskManager(include_path=folders, include_defaults=defaults, model_name=profile)

    @property
    def names(self) -> Sequence[str]:
        """All names, sorted."""
        names: Sequence[str] = self.manager.all_tasks
        return names

    def settings(self, name: str) -> Mapping[str, Any]:
        """What stands in the YAML file of a task or group, its functions left out."""
        from lmms_eval.utils import load_yaml_config

        path = self.manager.task_index[name]["yaml_path"]
        settings: Mapping[str, Any] = load_yaml_config(path, mode="simple") if isinstance(path, str) else {}
        return settings

    def output_type(self, name: str) -> str:
        """The type that a task's YAML declares; groups and tags count as generate_until until they are expanded."""
        if self.manager.task_index[name]["type"] != "task":
            return GENERATE
        return str(self.settings(name).get("output_type", GENERATE))

    def branches(self, wanted: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
        """The tasks of groups and tags, each with the groups that led to it.

        wanted: names with what they came from themselves. A group that gives its tasks settings of its own stays whole.
        """
        found: dict[str, list[str]] = {}
        for name, origin in wanted:
            for leaf, *groups in self._branch((name,)):
                found.setdefault(leaf, []).extend([*groups, *([origin] if origin != name else [])])
        return found

    def _branch(self, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        entry = self.manager.task_index[path[0]]
        inner = entry.get("task") if entry["type"] in ("group", "tag") else None
        if entry["type"] == "group" and inner == -1:  # lmms-eval has not read the file
            settings = self.settings(path[0])
            inner = settings["task"] if set(settings) <= PLAIN_GROUP else None
        if isinstance(inner, list) and all(isinstance(name, str) and name in self.manager.task_index for name in inner):
            for name in inner:
                yield from self._branch((name, *path))
        else:
            yield path

    def unknown(self, name: str, local: Sequence[str]) -> UnknownName:
        """The error for a name that is not here, with near matches and the `local` names."""
        near = difflib.get_close_matches(name, self.names, n=3, cutoff=0.5)
        hint = f" did you mean {' or '.join(map(repr, near))}?" if near else ""
        here = ", ".join(local) or "none"
        return UnknownName(f"unknown task {name!r};{hint} Local tasks: {here}. `vtc tasks --all` lists lmms-eval's own")

    def details(self, name: str) -> dict[str, str]:
        """What the file of one says of its data, and where it is."""
        settings, path = self.settings(name), self.manager.task_index[name]["yaml_path"]
        inner = settings.get("task")
        shown = {
            "kind": self.manager.task_index[name]["type"].removeprefix("python_"),
            "file": path if isinstance(path, str) else "",
            "tasks": ", ".join(map(str, inner)) if isinstance(inner, list) else "",
            "data set": ":".join(str(settings[key]) for key in ("dataset_path", "dataset_name") if settings.get(key)),
            "loaded with": str(settings.get("dataset_kwargs") or ""),
            "output": str(settings.get("output_type", "")),
        }
        return {head: text for head, text in shown.items() if text}

    def listed(self) -> list[dict[str, str]]:
        """Those that a sweep can name: ``{"name", "kind", "folder"}`` each."""
        listed = []
        for name in self.names:
            entry = self.manager.task_index[name]
            if self.output_type(name) == GENERATE:
                path = entry["yaml_path"]
                folder = str(Path(path).parent) if isinstance(path, str) else ""
                listed.append({"name": name, "kind": entry["type"].removeprefix("python_"), "folder": folder})
        return listed
