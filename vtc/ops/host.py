"""Numbers that the host knows, on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def put(numbers: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """`numbers` as ``torch.tensor`` takes them, on `device`; the host does not wait for what the device still does.

    ``torch.tensor(numbers, device="cuda")`` returns when all work before it is done: a selection would begin only after
    the vision tower has ended, and nothing of the language model could be sent ahead. A literal that is assigned
    through an index tensor (``kept[rows] = True``) is such a copy too; ``kept[rows] = kept.new_ones(())`` is none.

    >>> put([3, 1], torch.device("cpu")).tolist()
    [3, 1]
    """
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)
