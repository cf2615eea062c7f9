"""The closed vocabulary of the small model and the rule that cuts text into words."""

from __future__ import annotations

import re

from vtc.errors import InputError
from vtc.eval.tiny.canvas import COLOURS, SHAPES
from vtc.eval.tiny.glyphs import WORDS

PAD, UNKNOWN, BEGIN, END, IMAGE, USER, ASSISTANT = SPECIAL = (
    "<pad>",
    "<unk>",
    "<s>",
    "</s>",
    "<image>",
    "USER:",
    "ASSISTANT:",
)
VIDEO, VISION_START, VISION_END = "<video>", "<vision_start>", "<vision_end>"
PLURALS = {shape: f"{shape}es" if shape.endswith("ss") else f"{shape}s" for shape in SHAPES}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
LOCATIONS = ("top-left", "top-right", "bottom-left", "bottom-right")
_GRAMMAR = (
    *("is", "there", "a", "an", "what", "color", "shape", "the", "object", "objects", "how", "many", "are", "where"),
    *("relative", "to", "in", "top", "bottom", "left", "right", "above", "below", "digit", "word", "shown", "written"),
    *("?", ".", ",", "yes", "no"),
)
VOCABULARY: tuple[str, ...] = (
    *SPECIAL,
    *_GRAMMAR,
    *SHAPES,
    *PLURALS.values(),
    *COLOURS,
    *WORDS,
    *NUMBERS,
    *(str(digit) for digit in range(10)),
    *LOCATIONS,
)
# Words of the tasks that came after tiny-llava, whose vocabulary ends above. Trained models know words by their number:
# append here, never insert.
EXTENDED: tuple[str, ...] = (
    *VOCABULARY,
    *(VIDEO, VISION_START, VISION_END),
    *("small", "large", "picture", "pictures", "holds", "hold", "which", "most", "does", "move", "moves", "way"),
    *("appear", "appears", "before", "after", "first", "second", "third", "fourth", "last", "while", "times"),
    *("up", "down", "list", "read", "all", "every", "from", "words", "digits", "shapes", "colors", "seven", "eight"),
    *("and", "with", "same", "different", "both", "each", "or", "not", "it", "frame", "frames", "video", "then"),
    *(f"frame{number}:" for number in range(1, 17)),
)
TOKEN = {word: index for index, word in enumerate(EXTENDED)}


def words(text: str) -> list[str]:
    """Lower-case words of a text, with `?`, `.` and `,` as words of their own.

    >>> words("Is there a red ring?")
    ['is', 'there', 'a', 'red', 'ring', '?']
    """
    return re.findall(r"[?.,]|[^\s?.,]+", text.lower())


def encode(text: str) -> list[int]:
    """Token ids of a question or an answer; raises `InputError` for a word outside the vocabulary."""
    try:
        return [TOKEN[word] for word in words(text)]
    except KeyError as error:
        raise InputError(f"the word {error} of {text!r} is not in the vocabulary of the small model") from error
