"""Running a bench: scene by scene, in each round all arms in turn, beginning with another one each time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from vtc.errors import InputError, VTCError, one_line
from vtc.eval.bench.arms import Arm, arms, limit
from vtc.eval.bench.clock import no_collection
from vtc.eval.bench.models import Subject, subject
from vtc.eval.bench.record import BENCH, Record, SceneRecord, check_same, machine, read_record
from vtc.eval.bench.scene import Facts, Scene
from vtc.eval.bench.spec import BenchSpec, Load
from vtc.eval.progress import SilentProgress

SIDES, COUNTS, POINTS = (168, 336, 504, 672), (1, 2, 3), 4
"""Square pictures and numbers of pictures from which the loads of the break-even chart are chosen, and how many."""
WARM_TOKENS = 8
"""New tokens of a round that is not kept, at most."""


def bench(spec: BenchSpec, folder: Path, *, resume: bool = False, progress: SilentProgress | None = None) -> Record:
    """Measure what `spec` asks for into `folder`; with `resume`, only the rounds that are not there yet.

    Raises:
        InputError: the folder holds a bench already, or another one, or cannot be written.
        VTCError: a model or method that is unknown or refused as a whole. Methods that this model cannot run, or not at
            their budget, are left out, each with its reason.

    >>> from vtc.eval.bench.spec import BenchSpec
    >>> bench(BenchSpec(methods=("vtc-cls",)), Path("results/bench"))  # refused before anything is measured
    Traceback (most recent call last):
        ...
    vtc.errors.UnknownName: unknown method 'vtc-cls'; did you mean 'vtc_cls'? ...
    """
    progress = progress or SilentProgress()
    old = _stored(folder, resume)
    wanted = arms(spec.methods, spec.retentions)
    with _threads(spec.threads):
        found = subject(spec.model, layers=spec.layers, device=spec.device, dtype=spec.dtype, attention=spec.attention)
        about = machine(found)
        if old is not None:
            check_same(old, spec, about, folder)
        record = Record(spec, about if old is None else old.machine, {} if old is None else old.scenes)
        with progress:
            for sizes, chart in _scenes(spec, found).items():
                of_scene = [arm for arm in wanted if arm.kind != "downsample"] if chart else wanted
                _measure(record, Scene(found, *sizes, spec.prompt), of_scene, folder, progress, limits=not chart)
    return record


def _stored(folder: Path, resume: bool) -> Record | None:
    if resume:
        return read_record(folder)
    if (folder / BENCH).exists():
        raise InputError(f"{str(folder)!r} holds a bench; add --resume to go on with it, or choose another --out")
    return None


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before if count is None else count)
        yield
    finally:
        torch.set_num_threads(before)


def _scenes(spec: BenchSpec, found: Subject) -> dict[tuple[Load, int, int], bool]:
    """Load, batch size and new tokens of all scenes, and whether they are for the chart alone."""
    table = [(spec.load, batch, spec.new_tokens) for batch in spec.batch_sizes]
    loads = chosen(found, spec) if spec.loads is None else spec.loads
    return {(load, 1, 1): True for load in loads} | dict.fromkeys(table, False)


def chosen(found: Subject, spec: BenchSpec) -> list[Load]:
    """Loads whose numbers of visual tokens differ: larger pictures, or more of them where size changes nothing."""
    by_tokens: dict[float, Load] = {}
    more = [Load(count, spec.load.width, spec.load.height) for count in COUNTS]
    for load in [*(Load(1, side, side) for side in SIDES), *more]:
        if len(by_tokens) < POINTS:
            by_tokens.setdefault(Scene(found, load, 1, 1, spec.prompt).visual, load)
    return list(by_tokens.values())


def _measure(
    record: Record, scene: Scene, wanted: Sequence[Arm], folder: Path, progress: SilentProgress, *, limits: bool
) -> None:
    kept, found = record.scenes.get(scene.key), SceneRecord.of(scene, *_admitted(scene, wanted, limits))
    if kept is None:
        record.scenes[scene.key] = found
        record.write(folder)
        said = {line for other in record.scenes.values() if other is not found for line in other.left_out}
        for line in found.left_out:
            progress.note(f"left out: {line}") if line not in said else None
    elif kept.arms != found.arms:
        raise InputError(f"{str(folder)!r} holds other arms of {scene.key!r} than now; choose another --out")
    running = [arm for arm in [*wanted, *_limits(found.arms)] if arm.name in found.arms]
    done, repeats = len(record.scenes[scene.key].rounds), record.spec.repeats
    progress.start(max(done, repeats), done, f"rounds of {scene.key}")
    warmup = record.spec.warmup if done < repeats else 0
    for number in range(done - warmup, repeats):
        turn = number % len(running)
        order = running[turn:] + running[:turn]
        warm = number < done
        with no_collection():
            values = {
                arm.name: scene.request(arm, min(WARM_TOKENS, scene.new_tokens) if warm else None) for arm in order
            }
        if not warm:
            record.append(folder, scene.key, {arm.name: values[arm.name] for arm in running})
            progress.advance(1)


def _admitted(scene: Scene, wanted: Sequence[Arm], limits: bool) -> tuple[dict[str, Facts], list[str]]:
    """The arms that the scene's model can run, limits behind the others, and why the rest is left out."""
    admitted, left_out = dict[str, Facts](), list[str]()
    for arm in wanted:
        try:
            admitted[arm.name] = scene.admit(arm)
        except VTCError as error:
            if arm.kind == "untouched":
                raise
            name = scene.loaded.name  # of a folder, whose place is nobody's business
            left_out.append(f"{arm.name}: {one_line(error).replace(name, Path(name).name)}")
    for arm in _limits(admitted) if limits else ():
        try:
            admitted[arm.name] = scene.admit(arm)
        except Exception as error:  # what a family makes of embeddings without ids is its own
            left_out.append(f"{arm.name}: the model takes no embeddings in place of ids ({one_line(error)})")
    return admitted, left_out


def _limits(admitted: dict[str, Facts]) -> list[Arm]:
    tokens = sorted({round(each.visual) for each in admitted.values() if each.kind == "method"}, reverse=True)
    return [limit(count) for count in tokens]
