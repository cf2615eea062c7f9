"""All cells of a look on one picture: a block per cell, its stages side by side, the answer in its caption."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from vtc.app.show.look import Left, Look, Seen
from vtc.app.show.paint import Drawing, Pixels, paint, panels

GAP, LINE, FONT = 12, 20, 14
PAPER, INK, FAINT = (255, 255, 255), (20, 20, 20), (110, 110, 110)
WIDTH = 1200
"""Pixels after which blocks go on below."""
Bases = Sequence[Sequence[Pixels]]
"""Panels of every item."""


def bases_of(look: Look, side: int) -> Bases:
    """The panels of a look's items, `side` pixels on their longer side."""
    return [[base for _, base in panels(look, item, side)] for item in range(len(look.media))]


def strip(look: Look, left: Sequence[Left], bases: Bases, drawing: Drawing = "kept") -> Image.Image:
    """All panels of all items behind one stage, side by side, in lines where they are many."""
    return _flow(
        [
            paint(look.places[item], left[item], number, base, drawing)
            for item, several in enumerate(bases)
            for number, base in enumerate(several)
        ],
        gap=3,
    )


def untouched(bases: Bases) -> Image.Image:
    """The pictures as they are; overview and tiles show the same one, frames differ."""
    shown = [base for several in bases for base in (several if len(several) > 2 else several[:1])]
    return _flow([Image.fromarray(base.round().clip(0, 255).astype("uint8")) for base in shown], gap=3)


def sheet(look: Look, *, scores: bool = False, side: int = 240) -> Image.Image:
    """The pictures as given with the untouched answer, then every cell with its stages and its answer.

    scores: heat maps of what stages ranked by, beside those that tell. side: pixels of a panel's longer side.
    """
    bases = bases_of(look, side)
    given = untouched(bases)
    first = _column([_text(f"untouched, {look.tokens} visual tokens: {look.answer}", given.width), given])
    blocks = _flow([first, *(_cell(look, seen, bases, scores) for seen in look.seen)])
    page = _column([_text(look.prompt, blocks.width), blocks])
    framed = Image.new("RGB", (page.width + 2 * GAP, page.height + 2 * GAP), PAPER)
    framed.paste(page, (GAP, GAP))
    return framed


def _cell(look: Look, seen: Seen, bases: Bases, scores: bool) -> Image.Image:
    stages = []
    for name, left in seen.stages:
        count = sum(int(each.alive.sum()) for each in left)
        stages.append(_captioned(f"{name}: {count} left", strip(look, left, bases)))
        if scores and all(each.scores is not None for each in left):
            stages.append(_captioned(f"{name}: ranks", strip(look, left, bases, "scores")))
    drawn = _flow(stages) if stages else untouched(bases)
    asked = f"{seen.cell.name} {seen.cell.budget}".strip()
    head = _text(f"{asked}, {seen.kept:.4g} tokens per layer: {seen.answer}", drawn.width)
    return _column([head, drawn])


def _captioned(line: str, picture: Image.Image) -> Image.Image:
    return _column([_text(line, picture.width, FAINT), picture])


def _flow(blocks: Sequence[Image.Image], gap: int = GAP) -> Image.Image:
    """Blocks from left to right, line by line where they exceed the width."""
    lines: list[list[Image.Image]] = [[]]
    for block in blocks:
        if lines[-1] and sum(each.width + gap for each in lines[-1]) + block.width > WIDTH:
            lines.append([])
        lines[-1].append(block)
    rows = [_paste(line, across=True, gap=gap) for line in lines]
    return _paste(rows, across=False, gap=gap)


def _column(pictures: Sequence[Image.Image]) -> Image.Image:
    return _paste(pictures, across=False, gap=0)


def _paste(pictures: Sequence[Image.Image], *, across: bool, gap: int) -> Image.Image:
    widths, heights = [each.width for each in pictures], [each.height for each in pictures]
    space = gap * (len(pictures) - 1)
    size = (sum(widths) + space, max(heights)) if across else (max(widths), sum(heights) + space)
    made, at = Image.new("RGB", size, PAPER), 0
    for picture in pictures:
        made.paste(picture, (at, 0) if across else (0, at))
        at += (picture.width if across else picture.height) + gap
    return made


def _text(words: str, width: int, colour: tuple[int, int, int] = INK) -> Image.Image:
    """Lines of text, broken at `width` pixels."""
    font = ImageFont.load_default(FONT)
    lines = [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    made = Image.new("RGB", (width, LINE * len(lines)), PAPER)
    draw = ImageDraw.Draw(made)
    for number, line in enumerate(lines):
        draw.text((0, LINE * number + 1), line, fill=colour, font=font)
    return made
