"""Settings of the training of mini-llava."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vtc.errors import InputError
from vtc.eval.tiny.settings import Stage

COARSE = "coarse"
"""The stage in which the language model reads the means of 2 x 2 projected patches."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides the weights.

    pictures: different ones, half of each task, of which the first `first` are there from the beginning and `added`
    more at every step, so that the tower does not have to see all of them before the first step.
    """

    steps_align: int = 800
    steps_coarse: int = 2000
    steps_joint: int = 260
    batch_align: int = 16
    batch_joint: int = 2
    pictures: int = 8000
    first: int = 400
    added: int = 2
    seed: int = 0
    rate_align: float = 2e-3
    rate_joint: float = 5e-4
    pull_weight: float = 1.0
    size_weight: float = 1.0
    auxiliary_weight: float = 0.1  # of everything but the answers, once there are answers
    end_weight: float = 0.05
    weight_decay: float = 0.01
    clip: float = 2.0

    def __post_init__(self) -> None:
        for name in ("steps_align", "steps_coarse", "steps_joint", "batch_align", "batch_joint", "pictures", "first"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("added", "seed"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be at least 0, got {getattr(self, name)}")

    @property
    def stages(self) -> tuple[Stage, Stage, Stage]:
        """The projector on dense targets, then with low-rank changes on answers, first from a quarter of the rows."""
        return (
            Stage("align", self.steps_align, self.rate_align, warmup=50, floor=0.1, language=False),
            Stage(COARSE, self.steps_coarse, self.rate_joint, warmup=50, floor=0.4, language=True),
            Stage("joint", self.steps_joint, 0.4 * self.rate_joint, warmup=50, floor=0.05, language=True),
        )

    def available(self, step: int) -> int:
        """How many pictures there are at a step, counted over all stages."""
        return min(self.pictures, self.first + self.added * step)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for checkpoints and records."""
        return asdict(self) | {"stages": [asdict(stage) for stage in self.stages]}
