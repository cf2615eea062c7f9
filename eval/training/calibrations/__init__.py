"""What methods have to know of a model, measured on prompts: one module for each, of the method's name.

Its `calibration` takes the retention and the hyper-parameters that were asked for, and refuses what has no use.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from vtc import adapters
from vtc.app.loading import load
from vtc.errors import unknown_name
from vtc.eval.progress import SilentProgress
from vtc.eval.training.prompts import plain_prompts
from vtc.eval.training.settings import asked
from vtc.method import weights as store
from vtc.method.base import ModelSpec


class Calibrated(Protocol):
    """A method that says what its calibration depends on."""

    def settings(self, model: ModelSpec) -> dict[str, str]: ...


@dataclass(frozen=True)
class Calibration:
    """measure: what is measured of a model on prompts, by stored name. notes: kept beside it."""

    method: Calibrated
    measure: Callable[[nn.Module, Iterable[dict[str, Any]], SilentProgress | None], dict[str, Tensor]]
    notes: Mapping[str, str] = field(default_factory=dict)


def names() -> tuple[str, ...]:
    """The methods that can be calibrated.

    >>> names()
    ('atp_training_free', 'fitprune')
    """
    return tuple(sorted(info.name for info in pkgutil.iter_modules(__path__)))


def calibrate_embedded(
    out: Path,
    method: str,
    retention: float | None,
    parameters: Mapping[str, Any],
    name: str = "tiny-llava",
    task: str = "tiny_image",
    prompts: int = 200,
    seed: int = 0,
    device: str = "auto",
    progress: SilentProgress | None = None,
) -> Path:
    """Write what `method` has to know of an embedded model, from `prompts` questions about as many training scenes."""
    if method not in names():
        raise unknown_name("calibration", method, names())
    chosen: Calibration = importlib.import_module(f"{__name__}.{method}").calibration(retention, parameters)
    loaded = load(name, device=device, dtype="float32")
    tensors = chosen.measure(loaded.model, plain_prompts(loaded, asked(task), prompts, seed), progress)
    notes = {"base_model": name, "task": task, "prompts": str(prompts), "seed": str(seed)}
    settings = chosen.method.settings(adapters.of(loaded.model).spec)
    return store.save(out, tensors, {**notes, **chosen.notes, **settings})
