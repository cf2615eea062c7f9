"""Generation settings of a task, translated from lmms-eval's words to those of `model.generate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vtc.errors import InputError

PASSED_ON = ("max_new_tokens", "min_new_tokens", "num_beams", "repetition_penalty", "length_penalty")
SAMPLING = ("temperature", "top_p", "top_k")
# Belongs to the preprocessing of the original LLaVA code; Hugging Face processors have no such argument, and
# lmms-eval's own wrappers of Hugging Face models drop it as well.
DROPPED = ("image_aspect_ratio",)


@dataclass(frozen=True)
class Generation:
    """How answers are generated: `arguments` for `model.generate`, `until` strings at which the text is cut."""

    arguments: Mapping[str, Any] = field(default_factory=dict)
    until: tuple[str, ...] = ()

    @property
    def samples(self) -> bool:
        """Whether answers are drawn at random."""
        return bool(self.arguments.get("do_sample"))

    def cut(self, text: str) -> str:
        """`text` up to the first stop string.

        >>> Generation(until=("Question",)).cut("Paris. Question: what")
        'Paris. '
        """
        ends = [end for stop in self.until if (end := text.find(stop)) >= 0]
        return text[: min(ends, default=len(text))]


def make_generation(settings: Mapping[str, Any], *, source: str) -> Generation:
    """Translate lmms-eval's `generation_kwargs`.

    A temperature above 0 means sampling, whatever `do_sample` says, as in lmms-eval's own wrappers; temperature 0 means
    greedy decoding. In greedy decoding the sampling settings, including those of the model's own generation
    configuration, are switched off.

    Raises:
        InputError: a key that neither is passed on nor has a meaning here.

    >>> make_generation({"max_new_tokens": 8, "temperature": 0, "until": "END"}, source="task 'x'").until
    ('END',)
    """
    rest = dict(settings)
    until = [*_strings(rest.pop("until", None)), *_strings(rest.pop("stop_sequences", None))]
    for name in DROPPED:
        rest.pop(name, None)
    longest = rest.pop("max_gen_toks", None)
    if longest is not None:
        rest.setdefault("max_new_tokens", longest)
    do_sample, temperature = rest.pop("do_sample", None), rest.get("temperature")
    sampled = bool(do_sample) if temperature is None else float(temperature) > 0
    unknown = sorted(set(rest) - {*PASSED_ON, *SAMPLING})
    if unknown:
        raise InputError(
            f"{source}: generation setting {unknown[0]!r} is not supported;"
            f" known: {', '.join((*PASSED_ON, 'do_sample', *SAMPLING, 'until'))}"
        )
    arguments = {name: rest[name] for name in PASSED_ON if rest.get(name) is not None}
    arguments.setdefault("max_new_tokens", 16)
    arguments["do_sample"] = sampled
    for name in SAMPLING:
        if not sampled:
            arguments[name] = None
        elif rest.get(name) is not None:
            arguments[name] = rest[name]
    return Generation(arguments, tuple(stop for stop in until if stop))


def _strings(value: Any) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else [str(stop) for stop in value]
