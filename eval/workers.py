"""Workers in processes of their own: the pool over any kind of them, and the kind that lives on this machine."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import connection
from typing import Any, Protocol, Self

import torch

from vtc.errors import InputError, VTCError
from vtc.eval.answering import Outcome
from vtc.eval.execute import Ended
from vtc.eval.facts import Facts
from vtc.eval.plan import Item
from vtc.eval.progress import SilentProgress
from vtc.eval.spec import SHARED_DEVICES, SweepSpec
from vtc.eval.station import Order, Refused, Remote, cores
from vtc.eval.store import Record

Message = Facts | Refused | Outcome | Ended
START_METHOD = "spawn"
"""Nothing of the driver is in its processes; locks and threads of libraries do not survive a fork."""
STARTS = 3
"""So many processes in a row may end before they are ready; then the sweep ends."""


GRACE = 3.0
"""Seconds that a process has to end by itself."""


class Gone(Exception):
    """A process has ended; says how."""


class Link(Protocol):
    """The way to one process, which is started with it and begins at once."""

    def give(self, item: Item, following: Item | None) -> None:
        """Send what to run next; a process that has ended is noticed by `receive`."""

    def receive(self) -> Message | None:
        """What it said next, None if nothing after all.

        Raises:
            Gone: it has ended.
        """

    def end(self) -> None:
        """End it, whatever it does."""


class Engine(Protocol):
    """A kind of processes."""

    def start(self, worker: int, known: Mapping[str, Record]) -> Link:
        """Start a process in the place `worker`; `known`: cells whose setting another one has found."""

    def ready(self, links: Sequence[Link]) -> Sequence[Link]:
        """Wait until some of `links` have something to be received, and return those."""

    def close(self) -> None:
        """Leave nothing behind."""


class Crew:
    """A pool of processes (`vtc.eval.execute.Pool`): each is started when it is needed, and again when it is lost."""

    def __init__(self, engine: Engine, workers: int, progress: SilentProgress) -> None:
        self._engine, self._progress = engine, progress
        self._links: list[Link | None] = [None] * workers
        self._items: list[tuple[Item, Item | None] | None] = [None] * workers
        self._ready = [False] * workers
        self._starts = 0
        self._facts: Facts | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in range(len(self._links)):
            self._end(worker)
        self._engine.close()

    def facts(self) -> Facts:
        """What the first process found; waits until it has begun.

        Raises:
            VTCError: what it could not load.
        """
        self._link(0)
        while self._facts is None:
            self._step()
        return self._facts

    def idle(self) -> int | None:
        """A worker without an item, one that has begun if there is one."""
        free = [worker for worker, item in enumerate(self._items) if item is None]
        return min(free, key=lambda worker: not self._ready[worker], default=None)

    @property
    def busy(self) -> bool:
        """Whether any worker has an item."""
        return any(item is not None for item in self._items)

    def give(self, worker: int, item: Item, following: Item | None) -> None:
        """Send `item`; a process that is not there yet is started, and runs it when it has begun."""
        self._items[worker] = item, following
        self._link(worker).give(item, following)

    def wait(self) -> tuple[Item, Outcome | Ended]:
        """What happened next.

        Raises:
            VTCError: no process can be started, or one found another model or other tasks.
        """
        while (event := self._step()) is None:
            pass
        return event

    def _link(self, worker: int) -> Link:
        link = self._links[worker]
        if link is None:
            link = self._links[worker] = self._engine.start(worker, {} if self._facts is None else self._facts.known())
        return link

    def _end(self, worker: int) -> None:
        link, self._links[worker], self._ready[worker] = self._links[worker], None, False
        if link is not None:
            link.end()

    def _step(self) -> tuple[Item, Outcome | Ended] | None:
        waiting = [link for link, item, ready in zip(self._links, self._items, self._ready, strict=True)
                   if link is not None and (item is not None or not ready)]  # fmt: skip
        worker = self._links.index(self._engine.ready(waiting)[0])
        link, given = self._links[worker], self._items[worker]
        assert link is not None
        try:
            message = link.receive()
        except Gone as gone:
            return self._gone(worker, str(gone))
        if isinstance(message, Refused):
            raise message.kind(message.text)
        if isinstance(message, Facts):
            self._begun(worker, message)
        if message is None or isinstance(message, Facts):
            return None
        assert given is not None
        if isinstance(message, Ended):
            self._items[worker] = None
            if message.lost:
                self._end(worker)
        return given[0], message

    def _begun(self, worker: int, facts: Facts) -> None:
        self._ready[worker], self._starts = True, 0
        self._facts = self._facts or facts
        if (facts.settled, facts.tasks) != (self._facts.settled, self._facts.tasks):
            raise InputError(
                f"worker {worker} found another model or other tasks than worker 0; all machines of a sweep need the"
                " same checkpoint, the same versions of the packages and the same task folders"
            )

    def _gone(self, worker: int, reason: str) -> tuple[Item, Ended] | None:
        given, ready = self._items[worker], self._ready[worker]
        self._end(worker)
        if ready:
            self._items[worker] = None
            return (given[0], Ended(reason)) if given is not None else None
        self._starts += 1
        if self._starts >= STARTS:
            raise VTCError(
                f"{self._starts} worker processes in a row ended while they loaded the model ({reason}); give fewer"
                " --workers if memory is short. A script that calls run_sweep with several workers has to do so below"
                " `if __name__ == '__main__':`"
            )
        self._progress.note(f"note: worker {worker} was lost ({reason}) while it loaded the model; it is started again")
        link = self._link(worker)
        if given is not None:
            link.give(*given)
        return None


class LocalEngine:
    """Processes on this machine, made anew (`spawn`), each with its share of the cores and GPUs."""

    def __init__(self, spec: SweepSpec, known: Mapping[str, Record]) -> None:
        """Take the devices of `spec`; `known`: cells of a store whose setting is known.

        Raises:
            InputError: more GPUs are asked for than there are.
        """
        self._order = Order.of(spec, max(1, cores() // spec.workers), known)
        self._context = multiprocessing.get_context(START_METHOD)
        self._devices = [_devices(spec, worker, torch.cuda.device_count()) for worker in range(spec.workers)]

    def start(self, worker: int, known: Mapping[str, Record]) -> Link:
        """Start a process."""
        return _Process(self._context, worker, self._order.knowing(known), self._devices[worker])

    def ready(self, links: Sequence[Any]) -> Sequence[Any]:
        """Wait for bytes, or for the end of a process."""
        by_pipe = {link.pipe: link for link in links}
        return [by_pipe[pipe] for pipe in connection.wait(list(by_pipe))]

    def close(self) -> None:
        """Nothing is left once the processes have ended."""


def gpus_each(spec: SweepSpec, present: float, where: str) -> float:
    """GPUs of each worker; 0 leaves the choice to the device. present: how many there are; where: what has them.

    Raises:
        InputError: more are asked for.
    """
    share = spec.gpus_per_worker
    if share is None:
        share = 1.0 if present and spec.device in SHARED_DEVICES else 0.0
    if share * spec.workers > present:
        fitting = math.floor(100 * present / spec.workers) / 100
        instead = f"fewer --workers, or --gpus-per-worker {fitting:g} to share them" if fitting else "fewer --workers"
        if not present:
            instead = "no --gpus-per-worker"
        raise InputError(
            f"--workers {spec.workers} with --gpus-per-worker {share:g} need {math.ceil(share * spec.workers)} GPUs,"
            f" and {where} has {present:g}; give {instead}"
        )
    return share


def _devices(spec: SweepSpec, worker: int, present: int) -> str | None:
    """CUDA_VISIBLE_DEVICES of a worker; None leaves it as it is."""
    share = gpus_each(spec, present, "this machine")
    if not share:
        return None
    first = math.floor(worker * share + 1e-9)
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = shown.split(",") if shown else [str(number) for number in range(present)]
    return ",".join(names[first : first + max(1, math.ceil(share))])


class _Process:
    """One process and the pipe to it."""

    def __init__(self, context: Any, worker: int, order: Order, devices: str | None) -> None:
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_main, args=(theirs, order, devices), name=f"vtc-worker-{worker}")
        self._process.start()
        theirs.close()  # else its end would not be noticed here

    def give(self, item: Item, following: Item | None) -> None:
        """Send an item."""
        with contextlib.suppress(OSError):  # it has ended, which `receive` will say
            self.pipe.send((item, following))

    def receive(self) -> Message | None:
        """What it said next.

        Raises:
            Gone: it has ended.
        """
        try:
            message: Message = self.pipe.recv()
            return message
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode or 0
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            raise Gone(f"process {self._process.pid} {how}") from None

    def end(self) -> None:
        """Ask it to end, and kill it if it does not."""
        self.pipe.close()
        self._process.terminate()
        self._process.join(GRACE)
        self._process.kill()
        self._process.join()


def _main(pipe: Any, order: Order, devices: str | None) -> None:
    """What a process does: begin, then run items until the driver is gone; Ctrl-C is left to that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # leaves no semaphores behind, as dying of it would
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.dup2(2, 1)  # stdout belongs to the driver's results
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    remote = Remote(order)
    messages: Iterator[Message] = remote.begin()
    try:
        while True:
            for message in messages:
                pipe.send(message)
            messages = remote.run(*pipe.recv())
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the driver is gone
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is ending, and what ends last must not be interrupted


def _end_with_parent() -> None:
    """A driver that was killed leaves no process behind that goes on computing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
