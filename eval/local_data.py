"""What a task's code loads while it is built, and where it looks for videos: redirected for this task alone.

`datasets.load_dataset` is called by lmms-eval for the questions, and by some tasks themselves for pictures. All calls
come by `load_dataset_builder`, whatever name a module has bound. Videos are looked for below `HF_HOME`, which tasks
read when their module is run and lmms-eval reads before it downloads; a mapped task sees a home of links, of its own.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from vtc.errors import InputError, one_line
from vtc.eval.data_map import DataMap, Entry
from vtc.eval.local_rows import load_rows
from vtc.eval.scoped import Function, Mine, environment, replaced
from vtc.eval.suite import benchmark_of


class LocalData:
    """The local data of one task: `names` are the task and the groups it came from, `settings` those of its YAML file.

    files: those that were loaded in place of its data sets, in the order of loading. asked: what was asked for last and
    has no local copy; remedy: the line of a data map that would give it one.
    """

    def __init__(self, names: Sequence[str], settings: Mapping[str, Any], mapping: DataMap) -> None:
        self.names, self.settings, self.mapping = names, settings, mapping
        self.path, self.configuration = str(settings.get("dataset_path", "")), settings.get("dataset_name")
        self.split = settings.get("test_split") or settings.get("validation_split")
        self.benchmark = benchmark_of(names)
        self.media = mapping.media(names, self.path)
        self.files: list[Path] = []
        self.asked, self.remedy = "", ""
        self._home = _home(self._place, self.media) if self.media and self._place else None
        if self._home is not None:
            weakref.finalize(self, shutil.rmtree, self._home, ignore_errors=True)

    @property
    def _place(self) -> PurePosixPath | None:
        """The folder below HF_HOME where videos are looked for; None for a task without."""
        folder = (self.settings.get("dataset_kwargs") or {}).get("cache_dir")
        if self.benchmark is not None and self.benchmark.media:
            return PurePosixPath(self.benchmark.media)
        return PurePosixPath(folder) if folder else None

    @property
    def sought(self) -> str:
        """Where the task's videos are looked for, for messages."""
        return f"{os.environ.get('HF_HOME', '~/.cache/huggingface')}/{self._place}" if self._place else ""

    @contextmanager
    def surroundings(self) -> Iterator[None]:
        """Inside, the task's code finds its videos; without a map below HF_HOME, which some need to be set."""
        real = os.path.expanduser(os.environ.get("HF_HOME") or "~/.cache/huggingface")
        datasets_cache = os.environ.get("HF_DATASETS_CACHE") or os.path.join(real, "datasets")
        home = real if self._home is None else str(self._home)
        with environment({"HF_HOME": home, "HF_DATASETS_CACHE": datasets_cache}):
            yield

    @contextmanager
    def redirected(self) -> Iterator[None]:
        """`surroundings`, and what the body's thread loads comes from local files where the map has some."""
        import datasets.load
        import lmms_eval.api.task

        mine = Mine()

        def builder(below: Function) -> Function:
            def call(path: str, name: str | None = None, *args: Any, **kwargs: Any) -> Any:
                own = (path, name) == (self.path, self.configuration)
                entry = self.mapping.data(self.names, path, name, own=own)
                if entry is not None:
                    return _Rows(self, entry, name, own)
                key = f"{path}:{name}" if name else path
                self.asked, self.remedy = f"the data set {key!r}", f"{key}: PATH"
                made = below(path, name, *args, **kwargs)
                self.asked = ""
                return made

            return call

        def download(below: Function) -> Function:
            def call(repo_id: str, *args: Any, **kwargs: Any) -> Any:
                self.asked, self.remedy = f"the videos of {repo_id!r}", f"{repo_id}: {{media: FOLDER}}"
                made = below(repo_id, *args, **kwargs)
                self.asked = ""
                return made

            return call

        with ExitStack() as stack:
            stack.enter_context(self.surroundings())
            stack.enter_context(replaced(datasets.load, "load_dataset_builder", builder, mine))
            stack.enter_context(replaced(lmms_eval.api.task, "snapshot_download", download, mine))
            yield

    def check_columns(self, rows: Any, files: Sequence[Path], source: str) -> None:
        """Refuse rows without the columns that the task's code reads, where the table of benchmarks tells them.

        Raises:
            InputError: names file, task and columns.
        """
        needed = self.benchmark.columns if self.benchmark is not None else ()
        missing = [column for column in needed if column not in rows.column_names]
        if missing:
            raise InputError(
                f"{source}: task {self.names[0]!r} reads the columns {', '.join(needed)}; {str(files[0])!r} lacks"
                f" {', '.join(missing)} and has {', '.join(rows.column_names)}; write a file with all of them"
            )


class _Rows:
    """Stands in for the builder of a data set; these are the methods that `load_dataset` calls."""

    def __init__(self, data: LocalData, entry: Entry, configuration: str | None, own: bool) -> None:
        self.data, self.entry, self.configuration, self.own = data, entry, configuration, own
        self.info = self
        self.dataset_size = None

    def download_and_prepare(self, **_: Any) -> None:
        """Nothing: the files are here."""

    def as_dataset(self, split: Any = None, **_: Any) -> Any:
        """The rows of `split`, or of the split that the task reads, in a mapping."""
        import datasets

        assert self.entry.data is not None
        source = f"{self.data.mapping.source}: {self.entry.key!r}"
        wanted = str(split or self.data.split or "train")
        try:
            rows, files = load_rows(self.entry.data, self.configuration, wanted, self.data.media)
        except InputError as error:
            raise InputError(f"{source}, for task {self.data.names[0]!r}: {one_line(error)}") from error
        if self.own:
            self.data.check_columns(rows, files, source)
        self.data.files += [file for file in files if file not in self.data.files]
        return rows if split else datasets.DatasetDict({wanted: rows})


def _home(place: PurePosixPath | None, media: Path) -> Path:
    """A temporary folder in which `media` lies at `place`, or at its first part if it holds the rest."""
    assert place is not None
    home = Path(tempfile.mkdtemp(prefix="vtc-home-"))
    for depth in range(1, len(place.parts)):
        if (media / Path(*place.parts[depth:])).is_dir():
            place = PurePosixPath(*place.parts[:depth])
            break
    folder = home / place
    folder.mkdir(parents=True)
    for entry in media.iterdir():  # a link to the folder itself would make lmms-eval download what it links to
        (folder / entry.name).symlink_to(entry)
    return home
