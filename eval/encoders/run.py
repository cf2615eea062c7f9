"""A whole comparison of methods on a stand-alone encoder: a sweep whose questions are pictures."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtc.adapters.pairs import Encoder
from vtc.app.catalogue import acting_inside
from vtc.app.encoding import load_encoder
from vtc.errors import InputError, UnsupportedMethod
from vtc.eval.cells import Cell, make_cells, make_methods
from vtc.eval.encoders.folders import caption_task, class_task
from vtc.eval.encoders.scenes import SCENES, scene_tasks
from vtc.eval.encoders.tasks import PictureTask
from vtc.eval.encoders.worker import PictureWorker
from vtc.eval.execute import Here
from vtc.eval.facts import Facts
from vtc.eval.header import changes_since, check_same_sweep, documents, run_record
from vtc.eval.progress import SilentProgress, default_progress
from vtc.eval.report import write_report
from vtc.eval.rescoring import score_store
from vtc.eval.runner import few_threads
from vtc.eval.samples import write_samples
from vtc.eval.spec import SweepSpec, make_spec
from vtc.eval.store import Store, check_writable
from vtc.eval.sweep import SweepResult, answer_missing

MODEL, RETENTIONS = "tiny-clip", (1.0, 0.75, 0.5, 0.33, 0.25, 0.11)


@dataclass(frozen=True)
class Pictures:
    """Where the pictures come from; embedded scenes where neither a folder of classes nor captions are given.

    images: folder with a sub-folder for each class; classes, templates: how these are called. captions: file of
    pictures and texts. scenes: how many embedded ones.
    """

    images: Path | None = None
    classes: Path | None = None
    templates: Path | None = None
    captions: Path | None = None
    scenes: int | None = None

    def __post_init__(self) -> None:
        for name in ("classes", "templates"):
            if getattr(self, name) is not None and self.images is None:
                raise InputError(f"--{name} names the classes of a folder; give the folder with --images")
        if self.scenes is not None and (self.images or self.captions):
            raise InputError("--scenes counts embedded scenes, which --images and --captions replace; leave it away")
        if self.scenes is not None and self.scenes < 2:
            raise InputError(f"--scenes {self.scenes} is too few; among fewer than two nothing can be sought")

    def tasks(self, encoder: Encoder) -> list[PictureTask]:
        """The tasks, their texts encoded."""
        made: list[PictureTask] = []
        if self.images is not None:
            made.append(class_task(self.images, encoder, self.classes, self.templates))
        if self.captions is not None:
            made.append(caption_task(self.captions, encoder))
        if len({task.name for task in made}) < len(made):  # a folder and a file of one name
            made = [dataclasses.replace(task, name=f"{task.name}_{type(task).__name__.lower()}") for task in made]
        return made or scene_tasks(encoder, self.scenes or SCENES)


def run_encoders(
    settings: Mapping[str, Any],
    pictures: Pictures | None = None,
    *,
    pretrained: str | None = None,
    progress: SilentProgress | None = None,
) -> SweepResult:
    """Compare methods x retentions on an encoder, or take up where an earlier run of the same ended.

    settings: those of `vtc.eval.spec.SweepSpec` that an encoder has: model, methods, retentions, keep, limit,
    batch_size, out, plugins, seed, device, dtype, revision. Without `methods` all that act inside this encoder.
    pretrained: tag or file of a model of open_clip's.

    Raises:
        VTCError: everything that can be refused is, before the first picture is encoded.
    """
    progress = progress or default_progress()
    began = time.monotonic()
    pictures = pictures or Pictures()
    spec = _spec(settings)
    make_methods(spec)
    check_writable(spec.folder)
    progress.note(f"loading {spec.model}")
    encoder = load_encoder(
        spec.model, pretrained=pretrained, device=spec.device, dtype=spec.dtype, revision=spec.revision
    )
    if not settings.get("methods"):
        found = acting_inside(encoder.model).items()
        methods = [f"{name}(inside=true)" if options else name for name, options in found]
        spec = _spec({**settings, "methods": methods})
    with few_threads(encoder.model):
        cells = make_cells(spec, encoder.fingerprint())
        worker = PictureWorker(encoder, (), cells)
        for cell in cells:
            _check(worker, cell)
        tasks = pictures.tasks(encoder)
        worker = PictureWorker(encoder, tasks, cells)
        store = Store(spec.folder)
        if store.exists:
            check_same_sweep(store, spec, tasks, cells)
        names = {task.name: task.fingerprint for task in tasks}
        by_task = {task.name: cells for task in tasks}
        facts = Facts(spec.model, str(encoder.weight.device), encoder.fingerprint(), names, {}, ())
        with store.writing() as writer:
            for note in changes_since(store, spec):
                progress.note(f"note: {note}")
            run = run_record(store, spec, tasks, by_task, facts)
            run["sweeps"][-1]["spec"] |= {"encoder": _plain(pictures) | {"pretrained": pretrained}}
            writer.save_run(run)
            writer.add_cells(cell.record() for cell in cells)
            answered, failures = answer_missing(spec, tasks, by_task, Here(worker), writer, progress)
            for task in tasks:
                failures += score_store(task, documents(spec, task), cells[0].key(), writer, progress)
            write_samples(store, tasks)
    results = write_report(spec.folder)
    return SweepResult(spec.folder, results, failures, answered, time.monotonic() - began)


def _spec(settings: Mapping[str, Any]) -> SweepSpec:
    """The settings as a sweep has them, with the defaults of encoders."""
    default = {"model": MODEL, "methods": ["none"], "batch_size": 32}
    if not settings.get("keep"):
        default["retentions"] = RETENTIONS
    given = {**default, **settings}
    given.setdefault("out", Path("results") / f"encoders-{Path(str(given['model'])).name}")
    return make_spec({**given, "tasks": ["pictures"]}, source="vtc encoders")


def _check(worker: PictureWorker, cell: Cell) -> None:
    if cell.scales is not None:
        raise UnsupportedMethod(
            f"{cell.label!r} scales pictures down, to which an encoder's position embeddings do not adapt; leave it out"
        )
    with worker.attached(cell):
        pass


def _plain(pictures: Pictures) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(pictures).items()}
