"""What answers in one process: model, tasks and cells made from the spec, and what other processes are told of them.

A process that answers is told how to begin by an `Order`, and says what it found by `Facts`. Both are plain values, and
an order keeps its spec pickled until the plugins are imported that define the methods in it.
"""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from vtc.adapters.placement import device_of
from vtc.app import loading
from vtc.app.preparation import Chat, check_modalities
from vtc.errors import BudgetError, InputError, VTCError, one_line
from vtc.eval.answering import Outcome, Worker
from vtc.eval.catalogue import SweepTask, load_tasks
from vtc.eval.cells import Cell, make_cells, make_methods
from vtc.eval.execute import Ended
from vtc.eval.facts import Facts, Settled
from vtc.eval.failures import breaks_the_device
from vtc.eval.header import documents
from vtc.eval.messages import Clips
from vtc.eval.plan import Item
from vtc.eval.runner import Runner, few_threads
from vtc.eval.settling import SAMPLE, Settler
from vtc.eval.spec import SweepSpec
from vtc.eval.store import Record
from vtc.method.plugins import load_plugin


class Station:
    """A loaded model with the tasks of a sweep; `facts` tells of it, `worker` answers."""

    def __init__(
        self, spec: SweepSpec, tasks: Sequence[SweepTask], asked: Sequence[Chat], known: Mapping[str, Record]
    ) -> None:
        """Load the model of `spec`; `asked` are the first questions of the tasks, `known` cells with a setting.

        Raises:
            VTCError: no model, or a method that it cannot serve.
        """
        loaded = loading.load(
            spec.model,
            device=spec.device,
            max_memory=spec.max_memory,
            offload_folder=spec.offload_folder,
            dtype=spec.dtype,
            attn_implementation=spec.attn_implementation,
            revision=spec.revision,
        )
        for chat in asked:
            check_modalities(loaded, chat)
        self._runner = Runner(loaded)
        fingerprint = loaded.fingerprint()
        settler, settled, left_out = Settler(self._runner, _sample(spec, tasks), known), {}, []
        with few_threads(loaded.model):
            for cell in make_cells(spec, fingerprint):
                try:
                    made = self._runner.check(settler.settle(cell))
                except BudgetError as error:
                    left_out.append(str(error))
                    continue
                beyond = self._beyond(made, tasks, asked)
                left_out += [f"of {task}: {reason}" for task, reason in beyond.items()]
                if len(beyond) < len(tasks):
                    settled[cell.key()] = Settled(made.positions, made.setting, made.achieved, tuple(beyond))
        found = {task.name: task.fingerprint for task in tasks}
        device = str(device_of(loaded.model))
        self.facts = Facts(loaded.name, device, fingerprint, found, settled, tuple(left_out))
        self.worker = Worker(self._runner, tasks, self.facts.cells(spec), spec.video)

    def _beyond(self, cell: Cell, tasks: Sequence[SweepTask], asked: Sequence[Chat]) -> dict[str, str]:
        """The tasks that a cell cannot answer, and why."""
        found = {}
        for task, chat in zip(tasks, asked, strict=True):
            try:
                self._runner.check_chat(cell, chat)
            except BudgetError as error:
                found[task.name] = str(error)
        return found

    def __enter__(self) -> Station:
        self._open = contextlib.ExitStack()
        self._open.enter_context(contextlib.closing(self.worker))
        self._open.enter_context(few_threads(self._runner.model))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


def _sample(spec: SweepSpec, tasks: Sequence[SweepTask]) -> list[Chat]:
    """The prompts on which budgets in other units than tokens are settled; none where nothing has to be."""
    if spec.budget == "tokens":
        return []
    clips = Clips(spec.video)
    return [task.conversation(i, clips) for task in tasks for i in range(min(SAMPLE, documents(spec, task)))]


@dataclass(frozen=True)
class Order:
    """How another process begins: what it imports, the pickled spec, CPU threads, and cells whose setting is known."""

    plugins: tuple[str, ...]
    spec: bytes
    threads: int
    known: Mapping[str, Record]

    @classmethod
    def of(cls, spec: SweepSpec, threads: int, known: Mapping[str, Record]) -> Order:
        """The order for `spec`.

        Raises:
            InputError: a method object that cannot be sent.
        """
        try:
            return cls(spec.plugins, pickle.dumps(spec), threads, known)
        except Exception as error:
            raise InputError(
                f"a method object of this sweep cannot be sent to another process ({one_line(error)}); register its "
                "class in a file named under plugins and write the method by name, or use one local worker without "
                "gpus_per_worker"
            ) from error

    def knowing(self, known: Mapping[str, Record]) -> Order:
        """The same with more that is known."""
        return replace(self, known={**self.known, **known})


@dataclass(frozen=True)
class Refused:
    """Why a process cannot answer: an error that the driver raises."""

    kind: type[VTCError]
    text: str


class Remote:
    """The part of a process that answers for a driver elsewhere; what its methods return can be sent."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._station: Station | None = None

    def begin(self) -> Iterator[Facts | Refused]:
        """Import plugins, load tasks and model; one value, as a stream like all else."""
        yield self._begun()

    def _begun(self) -> Facts | Refused:
        try:
            for plugin in self._order.plugins:
                load_plugin(plugin)
            spec: SweepSpec = pickle.loads(self._order.spec)
            make_methods(spec)
            torch.set_num_threads(self._order.threads)
            tasks = load_tasks(spec.tasks, spec.include_path, spec.prompt_profile, spec.data_map)
            asked = [task.probe(Clips(spec.video)) for task in tasks]
            self._station = Station(
                spec, tasks, asked, self._order.known
            ).__enter__()  # for as long as the process lives
        except VTCError as error:
            return Refused(type(error), str(error))
        except Exception as error:
            return Refused(InputError, f"a worker cannot begin: {type(error).__name__}: {one_line(error)}")
        return self._station.facts

    def run(self, item: Item, following: Item | None) -> Iterator[Outcome | Ended]:
        """The outcomes of `item`, then one `Ended`.

        A process whose GPU failed says so instead of the failure: every further answer would fail for that reason, and
        none of them for one of its own.
        """
        assert self._station is not None, "begin comes first"
        for outcome in self._station.worker.run(item, following):
            if outcome.failure is not None and breaks_the_device(outcome.failure):
                yield Ended(lost=str(outcome.failure["reason"]))
                return
            yield outcome
        yield Ended()


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
