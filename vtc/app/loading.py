"""Load a model and its processor by name: an embedded model, a local folder or a hub name."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vtc import adapters, embedded
from vtc.adapters.compat import without_bars
from vtc.app.completeness import check_weights
from vtc.errors import InputError, UnsupportedModel, VTCError, one_line
from vtc.method.checkpoint import digests

BALANCED = "balanced"
"""The device that stands for all GPUs which the process sees."""


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model ready to generate, with its processor (left padding). name: as asked for; path: where it came from.

    processing: held by whoever uses the processor, whose tokenizer is no good in two threads at once.
    """

    name: str
    path: str
    model: Any
    processor: Any
    processing: threading.RLock = field(default_factory=threading.RLock, repr=False, compare=False)

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the numbers this model produces, whatever its folder is called.

        A hub checkpoint is its commit, a folder every byte of the files in it that count, see `vtc.method.checkpoint`.
        """
        config = self.model.config
        text = config.get_text_config()
        commit = getattr(config, "_commit_hash", None)
        checkpoint = {"commit": commit} if commit else digests(Path(self.path))
        return {
            "class": type(self.model).__name__,
            **checkpoint,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "attention": {"vision": _attention(config.vision_config, config), "text": _attention(text, config)},
        }


def load(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    attn_implementation: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | Path | None = None,
    revision: str | None = None,
) -> Loaded:
    """Load `name`: one of `vtc.embedded.NAMES`, a checkpoint folder or a hub name.

    device: "auto" takes the GPU if there is one, "balanced" spreads the model over all GPUs; device_map: the same in
    transformers' words. max_memory: what a spread model may take of each device, in bytes or as text, ``{0: "20GiB",
    "cpu": "60GiB"}``; devices that are not named get nothing, and layers without room stay on disk. offload_folder: for
    these, where the checkpoint's own files do not hold them as the model needs them. dtype: "auto" is the checkpoint's
    own on a GPU and float32 on the CPU. Raises InputError when nothing can be loaded and UnsupportedModel when no
    adapter knows the class; the class is checked from the configuration, before any weights are read.

    >>> load("tiny-llava", device="cpu", max_memory={"cpu": "4MB"})
    Traceback (most recent call last):
        ...
    vtc.errors.InputError: max_memory is for a model that is spread, and device='cpu' is one; write device='balanced'
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    path = _resolve(name)
    if device == BALANCED:
        device, device_map = "auto", device_map or BALANCED
    for option, given in (("max_memory", max_memory), ("offload_folder", offload_folder)):
        if given is not None and device_map is None:
            raise InputError(
                f"{option} is for a model that is spread, and device={device!r} is one; write device={BALANCED!r}"
            )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device_map is None:
        check_device(device)
    torch_dtype = dtype_of(dtype, device)
    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
        _check_class(name, config)
        options: dict[str, Any] = {"dtype": torch_dtype, "revision": revision}
        if device_map is not None:
            memory = None if max_memory is None else dict(max_memory)
            options |= {"device_map": device_map, "max_memory": memory, "offload_folder": offload_folder}
        if attn_implementation is not None:
            options["attn_implementation"] = attn_implementation
        with warnings.catch_warnings(), without_bars():
            warnings.simplefilter("ignore")  # advice about image-processor back ends
            processor = AutoProcessor.from_pretrained(path, revision=revision)
            _check_processor(name, processor)
            model, report = AutoModelForImageTextToText.from_pretrained(
                path, config=config, output_loading_info=True, **options
            )
            check_weights(name, model, report)
            if device_map is None:
                model = model.to(device)
    except VTCError:
        raise
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"model {name!r} does not fit on device {device!r} ({one_line(error)[:120]}); give another --device, "
            f"{BALANCED} for instance, or --dtype bfloat16"
        ) from error
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(
            f"cannot load model {name!r}: {reason}. Give an embedded model ({', '.join(embedded.NAMES)}), a checkpoint "
            "folder or a hub name"
        ) from error
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    adapters.of(model)
    return Loaded(name, path, model.eval(), processor)


def _resolve(name: str) -> str:
    if name in embedded.NAMES:
        return str(embedded.model_path(name))
    if Path(name).exists() and not Path(name).is_dir():
        raise InputError(f"model {name!r} is a file; give the checkpoint folder that holds config.json")
    if Path(name).is_dir() and not (Path(name) / "config.json").exists():
        raise InputError(f"model folder {name!r} holds no config.json; give the folder save_pretrained() wrote")
    return name


def dtype_of(dtype: str, device: str) -> Any:
    """What loaders take for a --dtype; "auto" is the checkpoint's own on a GPU and float32 on the CPU."""
    if dtype == "auto":
        return "auto" if device != "cpu" else torch.float32
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise InputError(f"dtype={dtype!r} is no torch dtype; write auto, float32, bfloat16 or float16")
    return found


def check_device(device: str) -> None:
    """InputError if no tensor can be put on `device`."""
    try:
        torch.empty(0, device=device)
        usable = torch.device(device).type != "meta"
        reason = "it holds no numbers"
    except Exception as error:
        usable, reason = False, one_line(error)
    if not usable:
        here = ", ".join(["auto", "cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))])
        raise InputError(f"device {device!r} cannot be used here ({reason}); write one of {here}")


def _check_processor(name: str, processor: Any) -> None:
    """InputError if transformers found only a part of a processor."""
    missing = [part for part in ("tokenizer", "image_processor") if getattr(processor, part, None) is None]
    if missing:
        raise InputError(
            f"model {name!r} comes with a {type(processor).__name__} without {' and '.join(missing)}; put what "
            "processor.save_pretrained() writes beside the weights"
        )


def _check_class(name: str, config: Any) -> None:
    known = adapters.supported_classes()
    classes = list(getattr(config, "architectures", None) or [])
    if classes and not set(classes) & set(known):
        raise UnsupportedModel(
            f"model {name!r} is a {classes[0]}, which is not supported; supported classes: {', '.join(sorted(known))}"
        )


def _attention(part: Any, whole: Any) -> str:
    return getattr(part, "_attn_implementation", None) or whole._attn_implementation or "eager"
