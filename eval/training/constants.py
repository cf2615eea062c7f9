"""Calibration of constant thresholds on training scenes of an embedded model."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vtc import adapters
from vtc.errors import VTCError
from vtc.eval.tiny.batches import normalise
from vtc.eval.tiny.scenes import make_scene
from vtc.eval.training import calibration
from vtc.eval.training.prompts import collate, draw
from vtc.method.registry import create
from vtc.methods.atp.training_free import ATPTrainingFree

BATCH = 20


def scene_prompts(count: int, seed: int, device: str) -> Iterator[dict[str, Tensor]]:
    """Batches of questions about the first `count` training scenes, without their answers."""
    rng = random.Random(f"calibration {seed}")
    for start in range(0, count, BATCH):
        scenes = [make_scene(number, "train") for number in range(start, min(start + BATCH, count))]
        batch = collate([draw(scene.items, rng) for scene in scenes], answers=False)
        batch["pixel_values"] = normalise(np.stack([scene.image for scene in scenes]))
        yield {name: value.to(device) for name, value in batch.items()}


def calibrate_embedded(
    out: Path,
    retention: float,
    parameters: Mapping[str, Any],
    name: str = "tiny-llava",
    prompts: int = 200,
    seed: int = 0,
    device: str = "auto",
) -> Path:
    """Write the thresholds that reach `retention` on average over `prompts` questions; returns the file."""
    from vtc.app.loading import load

    method = create("atp_training_free", **parameters)
    if not isinstance(method, ATPTrainingFree) or method.mode != "budget":
        raise VTCError("a calibration makes the constants itself; leave mode and weights out")
    model = load(name, device=device, dtype="float32").model
    tensors = calibration.calibrate(model, scene_prompts(prompts, seed, model.device.type), retention, method)
    notes = {
        "base_model": name,
        "retention": str(retention),
        "prompts": str(prompts),
        "seed": str(seed),
        "spatial_share": str(method.spatial_share),
    }
    return calibration.save(out, tensors, method, adapters.of(model).spec, notes)
