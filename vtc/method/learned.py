"""Methods with learned parts: a module built for a model, filled from a safetensors file whose settings must fit."""

from __future__ import annotations

import dataclasses
import json
import os
from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from vtc.errors import VTCError
from vtc.method import weights as store
from vtc.method.base import Compressor, ModelSpec
from vtc.method.registry import create


@dataclass(frozen=True)
class LearnedCompressor(Compressor):
    """A method that cannot run without weights. Subclasses implement `build` and `settings`, then `module` is ready.

    weights: path of a safetensors file, or the name of embedded weights (`vtc.weights.embedded_names()`). training:
    attach with gradients, for a trainer; without weights the module then starts fresh.
    """

    weights: str | os.PathLike[str] | None = field(default=None, kw_only=True)
    training: bool = field(default=False, kw_only=True)

    trained: ClassVar[bool] = True

    @classmethod
    def from_options(cls, **given: Any) -> Self:
        """As for every method, but what is not given comes from the file of `weights`, if it says so."""
        named = given.get("weights")
        fields = {f.name for f in dataclasses.fields(cls)}
        stored = _stored_options(cls.name, named, fields) if isinstance(named, str | os.PathLike) else {}
        return super().from_options(**{**stored, **given})

    def described(self) -> dict[str, Any]:
        given = super().described()
        return given if self.weights is None else {**given, "weights_digest": store.digest(self.weights)}

    @abstractmethod
    def build(self, model: ModelSpec) -> nn.Module:
        """A freshly initialised module for this model, drawn from torch's global generator."""

    @abstractmethod
    def settings(self, model: ModelSpec) -> dict[str, str]:
        """What must agree between training and use, as strings; stored with the weights and compared on loading."""

    def module(self, model: ModelSpec) -> nn.Module:
        """The float32 module: loaded from `weights`, or fresh if there are none and it is to be trained.

        Raises VTCError when weights are missing or were made with other settings.
        """
        if self.weights is None and not self.training:
            names = ", ".join(map(repr, store.embedded_names())) or "none"
            raise VTCError(
                f"{self.name!r} runs on learned weights and none were given; pass weights=<a {store.SUFFIX} file> as "
                f"`vtc train --method {self.name}` writes it, or the name of embedded ones ({names})"
            )
        module = self.build(model).float()
        if self.weights is not None:
            tensors, metadata = store.read(self.weights)
            check_settings(str(self.weights), metadata, self._described(model))
            load_tensors(str(self.weights), module, tensors)
        return module.train(self.training).requires_grad_(self.training)

    def save(
        self, path: str | Path, module: nn.Module, model: ModelSpec, notes: Mapping[str, str] | None = None
    ) -> Path:
        """Write the module's parameters with the settings; loading does not compare `notes` and hyper-parameters."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in ("weights", "training")]
        chosen = {name: getattr(self, name) for name in names}
        about = {name: value if isinstance(value, str) else json.dumps(value) for name, value in chosen.items()}
        about |= {"compressor": self.name, "hyper_parameters": json.dumps(chosen)}
        return store.save(path, module.state_dict(), {**about, **(notes or {}), **self._described(model)})

    def _described(self, model: ModelSpec) -> dict[str, str]:
        return {"method": self.name, **self.settings(model)}


def load(weights: str | os.PathLike[str]) -> LearnedCompressor:
    """The method that the file or the embedded `weights` belong to, with the hyper-parameters they were trained with.

    Example::

        with vtc.compress(model, vtc.learned.load("atp-tiny-llava")) as handle:
            model.generate(**inputs)
    """
    _, metadata = store.read(weights)
    if "compressor" not in metadata:
        raise VTCError(
            f"the weights {os.fspath(weights)!r} do not say which method they belong to; name it: "
            "create(<method>, weights=...)"
        )
    method = create(metadata["compressor"], weights=weights)
    if not isinstance(method, LearnedCompressor):
        raise VTCError(
            f"the weights {os.fspath(weights)!r} belong to {method.name!r}, which is no learned method; name it: "
            f"create({method.name!r}, weights=...)"
        )
    return method


def _stored_options(name: str, weights: str | os.PathLike[str], fields: Collection[str]) -> dict[str, Any]:
    """Hyper-parameters that the file of `weights` stores for the method `name`; none if it is another's."""
    _, metadata = store.read(weights)
    if metadata.get("compressor") != name or "hyper_parameters" not in metadata:
        return {}
    try:
        options = dict(json.loads(metadata["hyper_parameters"]))
    except (TypeError, ValueError) as error:
        raise VTCError(
            f"the hyper-parameters in the weights {os.fspath(weights)!r} cannot be read ({error}); train them anew"
        ) from error
    if unknown := sorted(options.keys() - fields):
        raise VTCError(
            f"the weights {os.fspath(weights)!r} were trained with {', '.join(unknown)}, which {name!r} does not have; "
            "they belong to another version of it: train them anew"
        )
    return options


def check_settings(source: str, stored: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Raise VTCError unless the `stored` metadata agree with every `wanted` entry."""
    for name, value in wanted.items():
        found = stored.get(name)
        if found is None:
            raise VTCError(
                f"the weights {source!r} do not say which {name} they were made with ({value!r} is wanted here); they "
                "were not written by this library, or by an older method: train them anew"
            )
        if found != value:
            raise VTCError(
                f"the weights {source!r} were made with {name}={found!r}, this run has {name}={value!r}; run them with "
                "the stored value, or train weights for this one"
            )


def load_tensors(source: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` into the module as float32; names and shapes must agree exactly."""
    expected = module.state_dict()
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        problem = f"lack {missing[0]!r}" if missing else f"hold {unknown[0]!r}, which nothing here uses"
        raise VTCError(f"the weights {source!r} {problem}; they belong to another method or model: train them anew")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise VTCError(
                f"the weights {source!r} hold {name!r} of shape {tuple(tensor.shape)}, {tuple(expected[name].shape)} "
                "is needed here; they belong to another model: train them anew"
            )
    with torch.no_grad():
        module.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
