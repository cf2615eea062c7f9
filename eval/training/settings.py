"""Settings of a training run of a learned compressor."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass, field
from typing import Any

from vtc.errors import InputError, VTCError
from vtc.eval.tiny.sample import Task
from vtc.eval.tiny.settings import Stage
from vtc.eval.tiny.tasks import TASKS
from vtc.method.learned import LearnedCompressor
from vtc.method.registry import create


@dataclass(frozen=True)
class TrainingSettings:
    """Everything that decides the weights.

    method, parameters: the compressor and its hyper-parameters. retention: for methods that take one. model: an
    embedded model, or a folder whose tokenizer knows the words of the tasks. task: a generated one whose answers are
    single words. steps, batch_size: one question about one scene per row. rate, warmup, weight_decay, clip: AdamW
    with a linear warm-up and a cosine down to `floor` * rate. llm_rate: rate of the LLM, 0 leaves it frozen; tower and
    projector always are. scenes: different training scenes. seed: of weights, order and questions. start: weights of
    another run, whose tensors of the same name and shape this one begins with.

    >>> TrainingSettings("atp", {"layers": (0, 1, 2), "bins": 64}, steps=500).compressor().layers
    (0, 1, 2)
    """

    method: str
    parameters: dict[str, Any] = field(default_factory=dict)
    retention: float | None = None
    model: str = "tiny-llava"
    task: str = "tiny_image"
    steps: int = 600
    batch_size: int = 16
    rate: float = 3e-3
    warmup: int = 30
    floor: float = 0.02
    weight_decay: float = 0.0
    clip: float = 1.0
    llm_rate: float = 0.0
    scenes: int = 2000
    seed: int = 0
    start: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "warmup", "scenes"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("rate", "clip"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("seed", "llm_rate", "weight_decay", "floor"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.batch_size > self.scenes:
            raise InputError(f"a batch of {self.batch_size} scenes needs at least as many scenes, got {self.scenes}")
        asked(self.task)
        self.compressor()

    def compressor(self) -> LearnedCompressor:
        """The method in training mode."""
        method = create(self.method, **self.parameters)
        if not isinstance(method, LearnedCompressor):
            raise VTCError(f"{self.method!r} has nothing to learn; it runs without training")
        if method.needs_budget and self.retention is None:
            raise InputError(f"{self.method!r} is trained at one retention; give it, for example retention=0.25")
        if not method.needs_budget and self.retention is not None:
            raise InputError(f"{self.method!r} takes no retention; its hyper-parameters decide how much it keeps")
        return dataclasses.replace(method, training=True)

    @property
    def stage(self) -> Stage:
        """The schedule of the learning rate."""
        return Stage(self.method, self.steps, self.rate, self.warmup, self.floor, language=self.llm_rate > 0)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for checkpoints and records."""
        return dataclasses.asdict(self)


def asked(name: str) -> Task:
    """A generated task by name.

    Raises:
        InputError: no such task, or one with answers of several words, whose score is no share of right ones.
    """
    single = [task for task in TASKS.values() if set(task.graded) <= set(task.answers)]
    found = next((task for task in single if task.name == name), None)
    if found is None:
        names = ", ".join(task.name for task in single)
        raise InputError(
            f"task {name!r} is none that is trained on: its answers have to be single words; write {names}"
        )
    return found


def command(run: dict[str, Any], out: str | None = None) -> str:
    """The command line of a training record; out: its folder, by default that of the method's name."""
    method, parameters = run["method"], run["parameters"]
    usual = {each.name: each.default for each in dataclasses.fields(TrainingSettings)}
    words = ["vtc", "train", "--method", method, "--out", out or f"runs/{method}"]
    for name, value in run.items():
        if name not in ("method", "parameters") and value != usual[name]:
            words += [f"--{name.replace('_', '-')}", str(value)]
    for name, value in parameters.items():
        words += ["--set", f"{name}={tuple(value) if isinstance(value, list) else value}".replace(" ", "")]
    return shlex.join(words)
