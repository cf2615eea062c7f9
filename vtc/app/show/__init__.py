"""Kept and merged tokens on the pixels: `vtc.show`, which the command `vtc show` calls."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vtc.app.images import open_image
from vtc.app.loading import Loaded
from vtc.app.media import Video
from vtc.app.options import output_path
from vtc.app.show.geometry import Media
from vtc.app.show.look import Cell, Look, look
from vtc.app.show.page import page
from vtc.app.show.sheet import sheet
from vtc.errors import InputError
from vtc.method.base import Compressor
from vtc.method.text import attachable

ENDINGS = (".png", ".webp", ".html")


class Shown:
    """What `show` returns: `look` holds the numbers, `image` and `html` draw them; Jupyter displays the image."""

    def __init__(self, look: Look, *, side: int = 240, scores: bool = False) -> None:
        self.look, self.side, self.scores = look, side, scores

    @property
    def image(self) -> Image.Image:
        """All cells on one picture."""
        return sheet(self.look, scores=self.scores, side=self.side)

    @property
    def html(self) -> str:
        """One page that loads nothing, with a slider over the budgets."""
        return page(self.look, side=self.side)

    def save(self, path: str | Path) -> Path:
        """Write a .png, a .webp or a .html.

        Raises:
            InputError: another ending, or a path that cannot be written.
        """
        file = ending(path)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".html":
                file.write_text(self.html, encoding="utf-8")
            else:
                file.write_bytes(self._drawn(file.suffix))
        except OSError as error:
            raise InputError(f"cannot write {str(file)!r}: {error.strerror or error}; choose another path") from error
        return file

    def _repr_png_(self) -> bytes:
        return self._drawn(".png")

    def _drawn(self, suffix: str) -> bytes:
        content = io.BytesIO()
        self.image.save(content, format=suffix[1:].upper(), quality=85, optimize=True)
        return content.getvalue()


def ending(path: str | Path) -> Path:
    """A path that `Shown.save` can write; InputError for other endings."""
    file = output_path(path)
    if file.suffix not in ENDINGS:
        raise InputError(
            f"{str(path)!r} ends in {file.suffix or 'nothing'!r}; write a file that ends in .png, .webp or .html"
        )
    return file


def show(
    model: Any,
    processor: Any,
    media: Any,
    prompt: str,
    methods: str | Compressor | Sequence[str | Compressor],
    retentions: float | Sequence[float] | None = None,
    *,
    keep: int | Sequence[int] | None = None,
    max_new_tokens: int = 32,
    side: int = 240,
    scores: bool = False,
    **options: Any,
) -> Shown:
    """Draw which tokens methods keep and merge, for one question about pictures or videos.

    media: a picture (whatever `vtc.app.images.open_image` takes), a `vtc.app.media.Video`, or a list of them. methods:
    names as the CLI takes them, such as "hiprune@0.5+mustdrop", or objects. retentions, keep: budgets,
    each of which every method gets. max_new_tokens: limit of an answer. side: pixels of a panel's longer side. scores:
    also draw what stages ranked by. options: further arguments of `vtc.compress`.

    >>> from vtc.app.loading import load
    >>> from PIL import Image
    >>> loaded = load("tiny-llava", device="cpu")
    >>> shown = show(loaded.model, loaded.processor, Image.new("RGB", (168, 168)), "what is this?", "stride", 0.25)
    >>> [(name, int(left.alive.sum())) for name, (left,) in shown.look.seen[0].stages]
    [('before the LLM', 36)]

    Raises:
        InputError: media, budgets or names that cannot be used.
        VTCError: a method cannot run on this model.
    """
    given = list(media) if isinstance(media, list | tuple) else [media]
    opened: list[Media] = [each if isinstance(each, Video) else open_image(each) for each in given]
    cells = cells_of(methods, retentions, keep, options)
    loaded = Loaded(getattr(model, "name_or_path", "") or type(model).__name__, "", model, processor)
    return Shown(look(loaded, opened, prompt, cells, max_new_tokens=max_new_tokens), side=side, scores=scores)


def cells_of(
    methods: str | Compressor | Sequence[str | Compressor],
    retentions: float | Sequence[float] | None = None,
    keep: int | Sequence[int] | None = None,
    options: dict[str, Any] | None = None,
) -> list[Cell]:
    """Every method under every budget; those that decide themselves how much they keep, once."""
    if retentions is not None and keep is not None:
        raise InputError(f"retentions={retentions!r} and keep={keep!r} given; pass one of them")
    names = [methods] if isinstance(methods, str | Compressor) else list(methods)
    shares = [] if retentions is None else [retentions] if isinstance(retentions, int | float) else list(retentions)
    counts = [] if keep is None else [keep] if isinstance(keep, int) else list(keep)
    budgets: list[dict[str, Any]] = [{"retention": float(each)} for each in shares] + [{"keep": n} for n in counts]
    cells = []
    for method in names:
        own = isinstance(method, str) and "@" in method
        free = own or (not isinstance(method, str) and not method.needs_budget)
        for budget in [{}] if free or not budgets else budgets:
            chosen, limits = attachable(method, {}, **budget) if isinstance(method, str) else (method, budget)
            label = method if isinstance(method, str) else method.name
            cells.append(Cell(label, chosen, options=options or {}, **limits))
    return cells
