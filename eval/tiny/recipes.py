"""One recipe per trained model: its family and its settings."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

from vtc.errors import unknown_name
from vtc.eval.tiny.family import Family
from vtc.eval.tiny.settings import Stage, check

SHARES = {"tiny_image": 0.22, "tiny_detail": 0.22, "tiny_video": 0.32, "tiny_list": 0.11, "tiny_multi": 0.13}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights of a model that is trained on a mixture of tasks."""

    model: str
    steps_tower: int = 800
    steps_joint: int = 7000
    batch_size: int = 32
    seed: int = 0
    different: int = 24_000  # samples of every task, over all its geometries
    shares: tuple[tuple[str, float], ...] = tuple(SHARES.items())
    rate_tower: float = 2e-3
    rate_joint: float = 1.5e-3
    language_weight: float = 4.0
    auxiliary_weight: float = 0.3
    end_weight: float = 0.05  # of the end token behind one-word answers; behind lists it counts like a word
    weight_decay: float = 0.01
    clip: float = 2.0
    start: str = ""  # embedded model, or folder, from which the tensors of same name and shape come; fresh if empty
    sizes: tuple[tuple[str, int], ...] = ()  # fields of the family that differ from its defaults

    def __post_init__(self) -> None:
        check(self, "steps_tower", "steps_joint", "batch_size", "different")

    @property
    def stages(self) -> tuple[Stage, Stage]:
        """The tower alone with its auxiliary losses, then everything."""
        return (
            Stage("tower", self.steps_tower, rate=self.rate_tower, warmup=50, floor=0.25, language=False),
            Stage("joint", self.steps_joint, rate=self.rate_joint, warmup=100, floor=0.01, language=True),
        )

    def family(self) -> Family:
        """The model class with the sizes of this recipe; raises `UnknownName` for a model without one."""
        if self.model not in RECIPES:
            raise unknown_name("model", self.model, tuple(RECIPES))
        module, _, name = _CLASSES[self.model].partition(":")
        made: Family = getattr(import_module(f"vtc.eval.tiny.{module}"), name)(**dict(self.sizes))
        return made

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for checkpoints and records."""
        plain = asdict(self) | {"shares": dict(self.shares), "sizes": vars(self.family())}
        return plain | {"stages": [asdict(stage) for stage in self.stages]}


# A longer stage "tower" is cheaper than the steps of "joint" that it saves; tiny-onevision began with a short one.
RECIPES = {
    "tiny-onevision": Recipe("tiny-onevision"),
    "tiny-qwen": Recipe("tiny-qwen", steps_tower=900, steps_joint=1800, batch_size=24, start="tiny-onevision"),
    "tiny-internvl": Recipe("tiny-internvl", steps_tower=900, steps_joint=1800, start="tiny-onevision"),
}
_CLASSES = {
    "tiny-onevision": "onevision:OneVision",
    "tiny-qwen": "qwen:Qwen",
    "tiny-internvl": "internvl:InternVL",
}
