"""What the tower is asked in training besides the answers: content, row and column of every patch or cell."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.eval.tiny.family import Seen
from vtc.eval.tiny.targets import PATCH_CLASSES, PRESENCE_BITS


def split_content(logits: Tensor) -> tuple[Tensor, ...]:
    """(B, n, all classes) as one (B, n, classes) tensor per entry of `PATCH_CLASSES`."""
    return tuple(torch.split(logits.float(), list(PATCH_CLASSES.values()), dim=-1))


def content_loss(logits: Sequence[Tensor], targets: Tensor) -> Tensor:
    """Half mean over all cells, half mean over those that hold something, summed over the kinds of content.

    logits: from `split_content`. targets: (B, 5, n).
    """
    total = logits[0].new_zeros(())
    for index, guess in enumerate(logits):
        target = targets[:, index].long()
        loss = F.cross_entropy(guess.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
        filled = target > 0
        total = total + 0.5 * loss.mean() + 0.5 * (loss * filled).sum() / filled.sum().clamp_min(1)
    return total


def place_loss(logits: Tensor, targets: Tensor, grid: int) -> Tensor:
    """Row and column of cells, mostly of those that hold something or its centre; logits (B, grid * grid, 2 * grid)."""
    logits = logits.float()
    number = torch.arange(grid * grid, device=logits.device).expand(len(logits), -1)
    row = F.cross_entropy(logits[..., :grid].transpose(1, 2), number // grid, reduction="none")
    column = F.cross_entropy(logits[..., grid:].transpose(1, 2), number % grid, reduction="none")
    filled, centre = targets[:, 0] > 0, targets[:, 4] > 0
    weight = 0.2 / number.numel() + filled / filled.sum().clamp_min(1) + centre / centre.sum().clamp_min(1)
    return 0.5 * (weight * (row + column)).sum()


class CellHeads(nn.Module):
    """Linear read-outs of the tower that exist in training only: content, row and column of every cell of a view.

    Class tokens are asked for what the view holds, which makes their attention point at things.
    `grid` is the number of cells per side of a view, 0 for a tower without absolute positions, which is not asked for
    rows and columns.
    """

    def __init__(self, width: int, grid: int, class_width: int = 0) -> None:
        super().__init__()
        self.grid = grid
        self.presence = nn.Linear(class_width, PRESENCE_BITS) if class_width else None
        self.content = nn.Linear(width, sum(PATCH_CLASSES.values()))
        self.place = nn.Linear(width, 2 * grid) if grid else None

    def forward(self, seen: Seen, targets: Tensor, present: Tensor) -> dict[str, Tensor]:
        """Losses "content", for a tower that knows positions "place", for one with class tokens "presence".

        `targets` (V, 5, n) and `present` (V, PRESENCE_BITS) say what the views hold.
        """
        losses = {"content": content_loss(self.content_logits(seen.cells), targets)}
        if self.place is not None:
            losses["place"] = place_loss(self.place(seen.cells), targets, self.grid)
        if self.presence is not None:
            logits = self.presence(seen.classes).float()
            losses["presence"] = 10 * F.binary_cross_entropy_with_logits(logits, present.float())
        return losses

    def content_logits(self, cells: Tensor) -> tuple[Tensor, ...]:
        """One (V, n, classes) tensor per entry of `PATCH_CLASSES`."""
        return split_content(self.content(cells))
