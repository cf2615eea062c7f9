"""A look as one self-contained page with a slider over the budgets."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vtc.app.show.look import Look, Seen
from vtc.app.show.sheet import Bases, bases_of, strip, untouched

TEMPLATE = Path(__file__).with_name("show.html")


def page(look: Look, *, side: int = 240) -> str:
    """The page; it loads nothing. side: pixels of a panel's longer side."""
    bases = bases_of(look, side)
    cells: dict[str, list[Seen]] = {}
    for seen in look.seen:
        cells.setdefault(seen.cell.name, []).append(seen)
    content = {
        "prompt": look.prompt,
        "tokens": look.tokens,
        "answer": look.answer,
        "given": _uri(untouched(bases)),
        "methods": [{"name": name, "cells": _cells(look, several, bases)} for name, several in cells.items()],
    }
    data = json.dumps(content, ensure_ascii=False).replace("<", "\\u003c")  # no text can end the script
    return TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", data)


def _cells(look: Look, seen: Sequence[Seen], bases: Bases) -> list[Mapping[str, Any]]:
    """From the smallest budget to the largest."""
    return [
        {
            "budget": each.cell.budget,
            "kept": f"{each.kept:.4g}",
            "answer": each.answer,
            "stages": [
                {
                    "name": name,
                    "count": sum(int(item.alive.sum()) for item in left),
                    "kept": _uri(strip(look, left, bases)),
                    "scores": _uri(strip(look, left, bases, "scores"))
                    if all(item.scores is not None for item in left)
                    else None,
                }
                for name, left in each.stages
            ],
        }
        for each in sorted(seen, key=lambda each: each.kept)
    ]


def _uri(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, format="WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"
