"""Whether a checkpoint holds the weights of the model that its configuration describes.

transformers fills what is missing with random numbers and leaves out what the model has no place for; both are a
warning there, and answers without a meaning afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from vtc.errors import InputError

SHOWN = 3


def check_weights(name: str, model: Any, report: Mapping[str, Any]) -> None:
    """InputError if `model`, loaded under `name`, is not what its checkpoint holds.

    report: what `from_pretrained(..., output_loading_info=True)` returns; tied weights do not count as missing there.
    Left-over weights pass if they belong to a part that the model does not have at all, as a classifier's head does.
    They are refused if the model has such a part, only fewer of them (layers), or has that part without them (biases).
    """
    missing = set(report["missing_keys"])
    if missing:
        raise InputError(
            f"model {name!r}: the checkpoint lacks {_some(missing)}, which would be random numbers; give the complete "
            "checkpoint, or the config.json that belongs to it"
        )
    shapes = report["mismatched_keys"]
    if shapes:
        key, stored, wanted = next(iter(sorted(shapes)))
        raise InputError(
            f"model {name!r}: {key} is {list(stored)} in the checkpoint and {list(wanted)} by its config.json; give "
            "the config.json that belongs to the weights"
        )
    modules = {_pattern(module) for module, _ in model.named_modules()}
    buffers = {buffer.rpartition(".")[2] for buffer, _ in model.named_buffers()}
    foreign = {
        key
        for key in report["unexpected_keys"]
        if _pattern(key.rpartition(".")[0]) in modules and key.rpartition(".")[2] not in buffers
    }
    if foreign:
        raise InputError(
            f"model {name!r}: the model of its config.json has no place for {_some(foreign)} of the checkpoint, so it "
            "is another model; give the config.json that belongs to the weights"
        )


def _pattern(module: str) -> str:
    """The path of a module whatever its number.

    >>> _pattern("model.layers.17.mlp")
    'model.layers.*.mlp'
    """
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module)


def _some(keys: Collection[str]) -> str:
    shown = sorted(keys)[:SHOWN]
    return ", ".join(shown) + (f" and {len(keys) - SHOWN} more weights" if len(keys) > SHOWN else "")
