"""Settings of a training run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from vtc.errors import InputError
from vtc.eval.tiny.model import ModelShape


@dataclass(frozen=True)
class Stage:
    """One schedule: linear warm-up to `rate`, then a cosine down to `floor` * `rate`."""

    name: str
    steps: int
    rate: float
    warmup: int
    floor: float
    language: bool  # False: tower and auxiliary heads only


def check(settings: Any, *counts: str) -> None:
    """InputError for a count below 1, a negative seed, and a batch that the scenes do not fill."""
    for name in counts:
        if getattr(settings, name) < 1:
            raise InputError(f"{name} must be at least 1, got {getattr(settings, name)}")
    if settings.seed < 0:
        raise InputError(f"seed must be at least 0, got {settings.seed}")
    if "scenes" in counts and settings.batch_size > settings.scenes:
        raise InputError(
            f"a batch of {settings.batch_size} scenes needs at least as many scenes, got {settings.scenes}"
        )


@dataclass(frozen=True)
class Settings:
    """Everything that decides the weights; the defaults are the recipe of the embedded model."""

    steps_tower: int = 2500
    steps_joint: int = 5000
    batch_size: int = 32
    seed: int = 0
    scenes: int = 60_000
    language_weight: float = 4.0
    auxiliary_weight: float = 0.3
    end_weight: float = 0.05
    weight_decay: float = 0.01
    clip: float = 2.0
    shape: ModelShape = field(default_factory=ModelShape)

    def __post_init__(self) -> None:
        check(self, "steps_tower", "steps_joint", "batch_size", "scenes")

    @property
    def stages(self) -> tuple[Stage, Stage]:
        """The tower alone with its auxiliary losses, then everything."""
        return (
            Stage("tower", self.steps_tower, rate=2e-3, warmup=50, floor=0.25, language=False),
            Stage("joint", self.steps_joint, rate=1.5e-3, warmup=100, floor=0.01, language=True),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for checkpoints and records."""
        return asdict(self) | {"stages": [asdict(stage) for stage in self.stages]}
