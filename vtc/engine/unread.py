"""What a selection says is read at some kinds of stages; where nobody would read it, it is refused."""

from __future__ import annotations

from vtc.errors import UnsupportedCall
from vtc.method.base import CacheStage, EncoderStage, Selection, Stage

_KINDS = {EncoderStage: "encoder stages", int: "stages in front of LLM layers", CacheStage: "stages after the prefill"}
_READERS: dict[str, tuple[str, tuple[type, ...]]] = {
    "tokens": ("replacement rows", (EncoderStage, int)),
    "separators": ("kept separators", (EncoderStage, int)),  # inside an encoder there are none to say it of
    "hide": ("hidden tokens", (int,)),
    "weights": ("soft masks", (int,)),
    "near": ("windows", (int,)),
    "gains": ("gains", (int,)),
    "sizes": ("sizes of tokens", (EncoderStage,)),
    "restored": ("restored rows", (EncoderStage,)),
    "entries": ("cache entries", (CacheStage,)),
    "loss": ("losses", (int,)),
}
"""Field of a Selection -> what it holds, and the kinds of stages that read it."""


def refuse_unread(selection: Selection, stage: Stage) -> None:
    """Raise UnsupportedCall where `selection` says what a stage of this kind would pass over in silence."""
    said = [each for name, each in _READERS.items() if getattr(selection, name) is not None]
    if selection.keep.ndim == 3:
        said.append(("kept sets of KV heads", (CacheStage,)))
    for what, readers in said:
        if not isinstance(stage, readers):
            raise UnsupportedCall(
                f"{what} were given at stage {stage}, which {' and '.join(_KINDS[each] for each in readers)} alone "
                "read; leave them out there"
            )
