"""The files that a bench lives in: `bench.json`, what was measured on what, and `rounds.jsonl`, a line per round.

A round is written when all of its arms are through, so that a bench which was killed keeps those it finished.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from vtc.adapters.placement import device_of
from vtc.errors import InputError
from vtc.eval.bench.models import Subject
from vtc.eval.bench.scene import Facts, Scene, Values, facts
from vtc.eval.bench.spec import AGAIN, BenchSpec
from vtc.eval.versions import versions
from vtc.eval.writing import write_files

BENCH, ROUNDS = "bench.json", "rounds.jsonl"


@dataclass
class SceneRecord:
    """A scene as it is kept: visual and text tokens of its prompts, the facts of its arms by name, why others are not
    there, and its rounds: values by arm and part.
    """

    pictures: int
    width: int
    height: int
    batch: int
    new_tokens: int
    visual: float
    text: int
    arms: dict[str, Facts]
    left_out: list[str]
    rounds: list[dict[str, Values]] = field(default_factory=list)

    @classmethod
    def of(cls, scene: Scene, arms: dict[str, Facts], left_out: list[str]) -> SceneRecord:
        """Of a scene that has no rounds yet."""
        sizes = vars(scene.load)
        return cls(**sizes, batch=scene.batch, new_tokens=scene.new_tokens, visual=scene.visual, text=scene.text,
                   arms=arms, left_out=left_out)  # fmt: skip

    def values(self, arm: str, part: str) -> list[float]:
        """A part of an arm round by round; empty where it does not apply."""
        found = [values[arm].get(part) for values in self.rounds]
        return [value for value in found if value is not None]


@dataclass
class Record:
    """A bench. machine: what its figures depend on beside the settings. scenes: by key."""

    spec: BenchSpec
    machine: dict[str, Any]
    scenes: dict[str, SceneRecord] = field(default_factory=dict)

    @property
    def main(self) -> dict[str, SceneRecord]:
        """The scenes of the table: one for each batch size."""
        sizes = {(*vars(self.spec.load).values(), batch, self.spec.new_tokens) for batch in self.spec.batch_sizes}
        return {key: scene for key, scene in self.scenes.items() if _sizes(scene) in sizes}

    @property
    def curve(self) -> list[SceneRecord]:
        """The scenes of the break-even chart, by their visual tokens."""
        others = [scene for scene in self.scenes.values() if scene.batch == 1 and scene.new_tokens == 1]
        return sorted((scene for scene in others if scene.rounds), key=lambda scene: scene.visual)

    def write(self, folder: Path) -> None:
        """Write what is no round into `folder`."""
        scenes = {
            key: {**vars(scene), "arms": {name: vars(each) for name, each in scene.arms.items()}}
            for key, scene in self.scenes.items()
        }
        for scene in scenes.values():
            scene.pop("rounds")
        made = {"spec": self.spec.record(), "machine": self.machine, "scenes": scenes}
        write_files(folder, {BENCH: (json.dumps(made, indent=1) + "\n").encode()})

    def append(self, folder: Path, key: str, values: dict[str, Values]) -> None:
        """Add a round to a scene, also in `folder`."""
        self.scenes[key].rounds.append(values)
        rounded = {arm: {part: _short(value) for part, value in of.items()} for arm, of in values.items()}
        with (folder / ROUNDS).open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            torn = size and file.seek(size - 1) >= 0 and file.read(1) != b"\n"  # killed in the middle of a line
            file.write(b"\n" * bool(torn) + json.dumps({"scene": key, "arms": rounded}).encode() + b"\n")


def read_record(folder: Path) -> Record:
    """The bench in `folder` with all finished rounds.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    path = folder / BENCH
    if not path.is_file():
        raise InputError(f"{str(folder)!r} holds no bench (no {BENCH}); give the folder that `vtc bench --out` wrote")
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
        scenes = {}
        for key, scene in made["scenes"].items():
            arms = {name: facts(each) for name, each in scene.pop("arms").items()}
            scenes[key] = SceneRecord(**scene, arms=arms)
        record = Record(BenchSpec.of(made["spec"]), made["machine"], scenes)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{str(path)!r} is no record of a bench ({error}); measure again into another --out"
        ) from error
    for line in (folder / ROUNDS).read_text(encoding="utf-8").splitlines() if (folder / ROUNDS).exists() else ():
        try:
            found = json.loads(line)
        except ValueError:  # the bench was killed while it wrote the last line
            continue
        record.scenes[found["scene"]].rounds.append(found["arms"])
    return record


def check_same(record: Record, spec: BenchSpec, machine: Mapping[str, Any], folder: Path) -> None:
    """Refuse to add rounds to a bench whose figures could not stand beside them.

    Raises:
        InputError: another setting, device, version or number of threads.
    """
    there, here = ({**each, **_flat(about)} for each, about in (
        (record.spec.record(), record.machine), (spec.record(), machine)
    ))  # fmt: skip
    names = [name for name in here if name not in (*AGAIN, "started") and there.get(name) != here[name]]
    changed = [f"{name} {there.get(name)!r} there, {here[name]!r} here" for name in names]
    if changed:
        raise InputError(f"{str(folder)!r} holds another bench ({'; '.join(changed)}); choose another --out")


def machine(subject: Subject) -> dict[str, Any]:
    """What figures depend on: the model as it was built, device, number type, attention, threads, versions."""
    model = subject.loaded.model
    config = model.config
    whole = config._attn_implementation or "eager"
    parts = {"text": config.get_text_config(), "vision": config.vision_config}
    return {
        "title": subject.title,
        "class": type(model).__name__,
        "source": subject.source,
        "weights": "random" if subject.random else "checkpoint",
        "layers": subject.layers,
        "of_layers": subject.of,
        "device": _device_name(device_of(model)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": {name: getattr(part, "_attn_implementation", None) or whole for name, part in parts.items()},
        "threads": torch.get_num_threads(),
        "versions": {**versions(), "cuda": torch.version.cuda},
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not isinstance(value, Mapping)} | {
        f"{outer} {name}": value
        for outer, inner in values.items()
        if isinstance(inner, Mapping)
        for name, value in inner.items()
    }


def _sizes(scene: SceneRecord) -> tuple[int, ...]:
    return scene.pictures, scene.width, scene.height, scene.batch, scene.new_tokens


def _short(value: float | None) -> float | None:
    return value if value is None or isinstance(value, int) else round(value, 7)
