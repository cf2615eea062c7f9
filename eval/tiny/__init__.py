"""A small vision-language model trained here from nothing, and the synthetic scenes it is trained and tested on.

`model_path("tiny-llava")` is a folder that `transformers` loads like any other checkpoint. Importing this package is
cheap: torch, transformers and scikit-learn are imported by the modules that need them.
"""

from __future__ import annotations

from pathlib import Path

from vtc.errors import unknown_name

NAMES = ("tiny-llava",)


def model_path(name: str) -> Path:
    """Folder of an embedded model; raises `UnknownName` for a name that is not in `NAMES`.

    >>> model_path("tiny-llava").name
    'tiny-llava'
    """
    if name not in NAMES:
        raise unknown_name("embedded model", name, NAMES)
    return Path(__file__).resolve().parent / "models" / name
