"""What is trained: the projector, and low-rank changes of the language model's matrices (LoRA, arXiv:2106.09685)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vtc.errors import InputError, one_line

RANK, ALPHA = 16, 32
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def linears(language_model: Any) -> dict[str, nn.Linear]:
    """All matrices of a Llama's layers by name."""
    return {
        name: module
        for name, module in language_model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in LINEARS
    }


class LowRank(nn.Module):
    """W + (alpha / rank) B A for every matrix of a language model, whose own weights stay what they are.

    A [rank, in] is random, B [out, rank] zero, so that the beginning is the model itself.
    """

    def __init__(self, language_model: Any, rank: int = RANK, alpha: float = ALPHA) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name, linear in linears(language_model).items():
            key, inputs = name.replace(".", "-"), linear.in_features
            self.down[key] = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
            self.up[key] = nn.Parameter(torch.zeros(linear.out_features, rank))

    def attach(self, language_model: Any) -> None:
        """Let the language model compute with the changes, in the type of its activations."""
        for name, linear in linears(language_model).items():
            linear.register_forward_hook(self._hook(name.replace(".", "-")))

    def _hook(self, key: str) -> Any:
        down, up = self.down[key], self.up[key]

        def change(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            low = F.linear(args[0], down.to(output.dtype)).flatten(0, -2)
            scaled = (self.scale * up).to(output.dtype)
            return torch.addmm(output.flatten(0, -2), low, scaled.t()).view_as(output)

        return change

    @torch.no_grad()
    def merge(self, language_model: Any) -> None:
        """Write the changes into the weights."""
        for name, linear in linears(language_model).items():
            key = name.replace(".", "-")
            linear.weight += (self.scale * self.up[key].float() @ self.down[key].float()).to(linear.weight.dtype)


class Projector(nn.Module):
    """Features brought to mean 0 and deviation 1 per channel, then LLaVA-1.5's two layers.

    The standardisation is fixed and becomes a part of the first layer in `plain`, since a LLaVA has no place for it.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("deviation", torch.ones(inputs))
        self.linear_1, self.linear_2 = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden)

    def standardise(self, features: Tensor) -> None:
        """Take mean and deviation from features (..., inputs)."""
        rows = features.flatten(0, -2).float()
        self.mean.copy_(rows.mean(0))
        self.deviation.copy_(rows.std(0).clamp_min(1e-4))

    def forward(self, features: Tensor) -> Tensor:
        """(..., inputs) -> (..., hidden)."""
        rows = (features.float() - self.mean) / self.deviation
        projected: Tensor = self.linear_2(F.gelu(self.linear_1(rows)))
        return projected

    def plain(self) -> dict[str, Tensor]:
        """The weights of the same function as LLaVA's projector computes it, in float32."""
        weight = self.linear_1.weight.detach() / self.deviation
        return {
            "linear_1.weight": weight,
            "linear_1.bias": self.linear_1.bias.detach() - weight @ self.mean,
            "linear_2.weight": self.linear_2.weight.detach(),
            "linear_2.bias": self.linear_2.bias.detach(),
        }


def write_file(path: Path, projector: Projector, low_rank: Mapping[str, Tensor], about: dict[str, str]) -> None:
    """Projector and the state of a `LowRank` in fp16, about 11 MB; the file appears when it is complete."""
    tensors = {f"projector.{name}": value for name, value in projector.plain().items()}
    tensors |= {f"low_rank.{name}": value for name, value in low_rank.items()}
    partial = path.with_suffix(".part")
    halves = {name: value.detach().cpu().half().contiguous() for name, value in tensors.items()}
    save_file(halves, partial, about)
    os.replace(partial, path)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file; raises InputError where it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"--adapter {path} cannot be read: {one_line(error)}") from error


def about(path: Path) -> dict[str, str]:
    """Stage and step of the run that a file of `write_file` comes from, and the seconds it took."""
    return _read(path)[1]


def merge_file(model: Any, path: Path) -> None:
    """Merge a file of `write_file` into a LLaVA; raises InputError where it is unreadable or of another model."""
    tensors, _ = _read(path)
    parts: dict[str, dict[str, Tensor]] = {"projector": {}, "low_rank": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = value.float()
    low_rank = LowRank(model.model.language_model)
    try:
        model.model.multi_modal_projector.load_state_dict(parts["projector"])
        low_rank.load_state_dict(parts["low_rank"])
    except RuntimeError as error:
        raise InputError(
            f"--adapter {path} belongs to another model: {one_line(error)}; write a file of vtc mini train"
        ) from error
    low_rank.merge(model.model.language_model)
