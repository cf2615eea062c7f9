"""What this machine and a checkpoint can do: versions, devices, attention kernels, extras, caches, and what is refused.

Nothing is loaded or fetched for it: a checkpoint is known by its configuration, as a model without numbers.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from vtc import adapters, embedded
from vtc.app.catalogue import list_methods
from vtc.errors import InputError, UnsupportedModel, VTCError, one_line
from vtc.method.checkpoint import user_cache
from vtc.method.registry import create

DISTRIBUTION = "visual-token-compression"
PACKAGES = ("torch", "transformers", "safetensors", "numpy", "accelerate", "lmms-eval", "open_clip_torch", "ray")
"""Whose versions matter when something differs."""
AVAILABLE = "available"
KERNELS = {
    "flash_attention_2": ("flash_attn", True),
    "flash_attention_3": ("flash_attn_3", True),
    "flex_attention": ("torch.nn.attention.flex_attention", False),
}
"""Attention implementation -> the module that it needs, and whether it needs a GPU."""


def examine(model: str | None = None, *, attn_implementation: str | None = None) -> dict[str, Any]:
    """Everything `vtc doctor` tells, as plain data; with `model`, also what runs on it and why the rest is refused.

    Raises InputError for a model whose configuration cannot be read.
    """
    found: dict[str, Any] = {
        "versions": versions(),
        "devices": devices(),
        "attention": kernels(),
        "extras": extras(),
        "caches": caches(),
        "offline": offline(),
    }
    if model is not None:
        found["model"] = checkpoint(model, attn_implementation)
    return found


def versions() -> dict[str, str | None]:
    """Of Python, this package and those it stands on; None for those that are not installed."""
    installed = {"python": platform.python_version(), "platform": platform.platform(), DISTRIBUTION: _version("")}
    return installed | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package or DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> list[dict[str, Any]]:
    """The CPU and every GPU that torch can use; GiB of memory where the device tells."""
    found: list[dict[str, Any]] = [{"name": "cpu", "what": platform.machine(), "threads": torch.get_num_threads()}]
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        found.append({"name": f"cuda:{number}", "what": facts.name, "gib": round(facts.total_memory / 2**30, 1)})
    if torch.backends.mps.is_available():
        found.append({"name": "mps", "what": "Apple GPU"})
    return found


def kernels() -> dict[str, str]:
    """Attention implementations of transformers -> "available", or why not."""
    return {"sdpa": AVAILABLE, "eager": AVAILABLE} | {name: _kernel(*about) for name, about in KERNELS.items()}


def _kernel(module: str, on_gpu: bool) -> str:
    missing = ["torch sees no GPU"] if on_gpu and not torch.cuda.is_available() else []
    missing += [] if _there(module) else [f"{module} is not installed"]
    return " and ".join(missing) or AVAILABLE


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def extras() -> dict[str, list[str]]:
    """Extras of this package -> what is missing of each, as requirements."""
    missing: dict[str, list[str]] = {}
    about = importlib.metadata.metadata(DISTRIBUTION)
    for name in about.get_all("Provides-Extra") or []:
        missing[name] = []
        for text in importlib.metadata.requires(DISTRIBUTION) or []:
            wanted = Requirement(text)
            if wanted.marker and wanted.marker.evaluate({"extra": name}) and not wanted.marker.evaluate({"extra": ""}):
                version = _version(wanted.name)
                if version is None or version not in wanted.specifier:
                    missing[name].append(f"{wanted.name}{wanted.specifier}")
    return missing


def caches() -> dict[str, dict[str, Any]]:
    """Where models and data sets lie, and whether the folder is there."""
    cache = user_cache()
    home = Path(os.environ.get("HF_HOME") or cache / "huggingface")
    places = {
        "models of the hub": Path(os.environ.get("HF_HUB_CACHE") or home / "hub"),
        "data sets": Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets"),
        "mini-llava": cache / "vtc",
        "embedded models": embedded.model_path(embedded.NAMES[0]).parent,
    }
    return {what: {"path": str(path), "there": path.is_dir()} for what, path in places.items()}


def offline() -> bool:
    """Whether HF_HUB_OFFLINE keeps the libraries from asking the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def checkpoint(name: str, attn_implementation: str | None = None) -> dict[str, Any]:
    """What runs on a model: its class, family and modalities, and of every method whether it is refused, and why.

    least: the retention that a method has to exceed there, because layers in front of it see every token.
    """
    answer: dict[str, Any] = {"name": name, "class": None, "family": None, "modalities": [], "refused": None}
    try:
        model = _empty(name, attn_implementation)
        answer["class"] = type(model).__name__
        if adapters.encoder_of(model) is None:
            adapter = adapters.of(model)
            answer |= {"family": adapter.family, "modalities": list(adapter.modalities)}
    except UnsupportedModel as error:
        return answer | {"refused": str(error), "methods": {}}
    return answer | {"methods": {name: _tried(model, name) for name in list_methods()}}


def _tried(model: Any, method: str) -> dict[str, Any]:
    from vtc.engine.trial import try_out  # brings in transformers, which `vtc doctor` without a model does without

    try:
        return {"refused": None, "least": round(try_out(model, create(method)), 3)}
    except VTCError as error:
        return {"refused": str(error), "least": None}


def _empty(name: str, attn_implementation: str | None) -> Any:
    """The model `name` from its configuration alone, without memory for its weights."""
    import transformers  # as above

    path = str(embedded.model_path(name)) if name in embedded.NAMES else name
    try:
        config = transformers.AutoConfig.from_pretrained(path)
    except Exception as error:
        raise InputError(
            f"no configuration can be read from {name!r} ({one_line(error)[:160]}); give an embedded model "
            f"({', '.join(embedded.NAMES)}), a checkpoint folder or a hub name"
        ) from error
    known = {*adapters.supported_classes(), *(each.partition(".")[2] for each in adapters.ENCODERS)}
    named = [each for each in getattr(config, "architectures", None) or [] if each in known]
    if not named:
        raise UnsupportedModel(
            f"model {name!r} is a {(config.architectures or [config.model_type])[0]}, which is not supported; "
            f"supported classes: {', '.join(sorted(adapters.supported_classes()))}"
        )
    cls = getattr(transformers, named[0], None)
    if cls is None:
        raise UnsupportedModel(f"model {name!r} is a {named[0]}, which this transformers does not have; upgrade it")
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with torch.device("meta"):
        return cls._from_config(config, **options).eval()
