"""Learned parts on disk: one safetensors file each, with the settings they were made with in its metadata.

A file is named by its path, or by its stem if it is one of the embedded ones that come with the library.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from vtc.embedded import WEIGHTS
from vtc.errors import InputError, shown, unknown_name

SUFFIX = ".safetensors"


def embedded_names() -> tuple[str, ...]:
    """Names of the embedded weights, sorted."""
    return tuple(sorted(path.stem for path in WEIGHTS.glob(f"*{SUFFIX}")))


def find(path_or_name: str | os.PathLike[str]) -> Path:
    """The file behind a path or an embedded name; a file of the working directory wins over an embedded one.

    Raises InputError for a path without a file and UnknownName for anything else that is not embedded.
    """
    if not isinstance(path_or_name, str | os.PathLike):
        raise InputError(
            f"weights={shown(path_or_name)} name no file; give the path of a {SUFFIX} file or an embedded name"
        )
    name = os.fsdecode(path_or_name)
    path = Path(os.path.expanduser(name))
    if os.path.isfile(path):  # False, not an error, for names that no file can have
        return path
    if name in embedded_names():
        return WEIGHTS / f"{name}{SUFFIX}"
    if path.suffix or len(path.parts) > 1:
        raise InputError(f"there is no weights file {name!r}; give the path of a {SUFFIX} file or an embedded name")
    raise unknown_name("embedded weight", name, embedded_names())


def save(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write `tensors` and `metadata` to `path`, replacing the file in one step; missing folders are made.

    The bytes depend on nothing but the arguments.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise InputError(f"{str(path)!r} does not end in {SUFFIX}; write for example weights{SUFFIX}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.part")
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    partial.write_bytes(_with_metadata(safetensors.torch.save(held), metadata))
    os.replace(partial, path)
    return path


def _with_metadata(plain: bytes, metadata: Mapping[str, str]) -> bytes:
    """The file with `metadata` in its header: safetensors itself writes them in another order every time."""
    end = 8 + int.from_bytes(plain[:8], "little")
    header = json.loads(plain[8:end])
    header.pop("__metadata__", None)
    text = json.dumps({"__metadata__": dict(sorted(metadata.items())), **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + plain[end:]


def digest(path_or_name: str | os.PathLike[str]) -> str:
    """16 hexadecimal digits that change with the file's bytes."""
    return hashlib.sha256(find(path_or_name).read_bytes()).hexdigest()[:16]


def read(path_or_name: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, on the CPU, and metadata of a file; see `find` for what may be given."""
    path = find(path_or_name)
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{str(path)!r} cannot be read as a {SUFFIX} file ({error})") from error
