"""Pull a patch's row towards the input embeddings of the words that name what the patch shows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vtc.eval.tiny.canvas import COLOURS, SHAPES
from vtc.eval.tiny.glyphs import WORDS

NAMES: tuple[tuple[str, ...], ...] = (
    ("", *SHAPES, "", ""),  # that it is a digit or a word does not name it
    ("", *COLOURS),
    ("", *(str(digit) for digit in range(10))),
    ("", *WORDS),
)
"""The word for every class of the first four targets of a patch; "" where there is none."""


class Naming:
    """Embeddings of the names, as differences from the mean embedding, which says nothing."""

    def __init__(self, tokenizer: Any, embeddings: Tensor) -> None:
        """embeddings: [vocabulary, hidden], the language model's own."""
        table = embeddings.detach().float()
        mean = table.mean(0)
        self.size = 2 * float(table.std())
        """Root mean square that rows should have."""

        def vector(name: str) -> Tensor:
            if not name:
                return torch.zeros_like(mean)
            ids = tokenizer(f" {name}", add_special_tokens=False)["input_ids"]
            return table[torch.tensor(ids, device=table.device)].mean(0) - mean

        self._tables = [torch.stack([vector(name) for name in names]) for names in NAMES]

    def losses(self, rows: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """ "pull", 0 where named rows point to their names and 2 where they point away, and "size" of all rows.

        rows: (B, T, hidden). targets: (B, 5, T), as `cell_targets` gives them.
        """
        rows = rows.float()
        wanted = sum((table[targets[:, place].long()] for place, table in enumerate(self._tables)), torch.zeros(()))
        named = (targets[:, 0] > 0).float()
        away = 1 - F.cosine_similarity(rows, wanted, dim=-1)
        size = rows.pow(2).mean(-1).sqrt() / self.size
        return {"pull": (away * named).sum() / named.sum().clamp_min(1), "size": size.log().pow(2).mean()}
