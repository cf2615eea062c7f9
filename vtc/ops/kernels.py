"""Triton kernels for walks whose steps wait for each other: one launch instead of several per step.

On a GPU a step of a greedy walk costs torch ten launches of microseconds each, whatever it computes. The kernels are
taken where Triton is installed and tensors lie on a GPU; ``VTC_TRITON=0`` leaves all to torch. ``TRITON_INTERPRET=1``
runs them in Triton's interpreter on the CPU, as the tests do.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

MOST = 2**13
"""Tokens of an item that one program of the GPU holds in its registers."""


def usable(tensor: Tensor) -> bool:
    """Whether what lies beside `tensor` is walked by a kernel.

    >>> usable(torch.zeros(1))
    False
    """
    if os.environ.get("VTC_TRITON") == "0" or not (tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return False
    return not torch.compiler.is_compiling() and _walk() is not None


def walk(cosines: Tensor, mask: Tensor, start: Tensor, steps: int, slack: float, *, farthest: bool) -> Tensor:
    """The order [I, steps] of `max_sum` or, if `farthest`, of `k_center` over known cosines [I, N, N]; N <= `MOST`.

    mask: [I, N] bool. start: [I]. slack: values that differ by less are equal, times the step for sums.
    """
    items, length = mask.shape
    order = torch.zeros(items, steps, dtype=torch.long, device=mask.device)
    if items and steps:
        block = max(16, 1 << (length - 1).bit_length())
        with torch.cuda.device_of(cosines):  # type: ignore[no-untyped-call]
            _walk()[(items,)](
                cosines, mask, start, order, length, steps, slack, FARTHEST=farthest, BLOCK=block,
                num_warps=min(16, max(1, block // 256)),
            )  # fmt: skip
    return order


@functools.cache
def _walk() -> Any:
    """The kernel, one program per item; None without Triton."""
    try:
        from vtc.ops.walks import walk  # Triton, which takes a second and not every platform has
    except ImportError:
        return None
    return walk
