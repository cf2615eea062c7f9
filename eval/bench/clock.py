"""Time and memory of a device: events and the allocator on a GPU, the clock and the kernel's count on a CPU."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

Mark = Any
"""A moment: seconds, or an event on the stream of a GPU."""
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Clock:
    """Marks moments without waiting for the device; `seconds` tells the time between two of them after `settle`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._gpu = device.type == "cuda"

    def mark(self) -> Mark:
        """This moment; on a GPU the one at which its stream gets here."""
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def settle(self) -> None:
        """Wait until everything before is done."""
        if self._gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, start: Mark, end: Mark) -> float:
        """The time between two marks."""
        return float(start.elapsed_time(end)) / 1000 if self._gpu else float(end - start)


class Memory:
    """The most memory that is in use at once between `start` and `peak`, weights included.

    On a GPU what its allocator handed out. On the CPU what of the process was resident, where Linux lets it be reset;
    memory that was freed is given back to the system before, as far as the C library does.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self) -> int | None:
        """Bytes in use now, None where they are not known; the peak counts from here."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        if self.device.type != "cpu" or not sys.platform.startswith("linux"):
            return None
        with suppress(OSError, AttributeError):  # other C libraries have no malloc_trim
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        try:
            RESET.write_text("5")  # the high-water mark of resident memory, see proc(5)
        except OSError:
            return None
        return _status("VmRSS")

    def peak(self) -> int | None:
        """The most bytes in use since `start`."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _status("VmHWM")


def _status(name: str) -> int | None:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    return None


@contextmanager
def no_collection() -> Iterator[None]:
    """Python's garbage is collected now, and not again before the block ends."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
