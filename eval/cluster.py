"""Workers that Ray places, on this machine or on a running cluster.

Ray restarts and retries nothing here: the driver notices the end of an actor, makes another one and decides what is
asked again, as it does with processes of its own. Without an address Ray is started for this sweep alone.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from vtc.errors import InputError, one_line
from vtc.eval.plan import Item
from vtc.eval.spec import SweepSpec
from vtc.eval.station import Order, Remote, cores
from vtc.eval.store import Record
from vtc.eval.workers import Gone, Link, Message, gpus_each

STORE_BYTES = 200 << 20
"""Of Ray's object store; what is sent are texts and numbers."""


class RayEngine:
    """Actors of Ray."""

    def __init__(self, spec: SweepSpec, known: Mapping[str, Record]) -> None:
        """Start Ray, or connect to the cluster at the spec's address; `known`: cells whose setting is known.

        Raises:
            InputError: Ray is not installed, the cluster is not reached, or has not what the workers need.
        """
        if spec.address is None and "ray" not in sys.modules:  # it reads them once, when it is imported
            # Else Ray makes a token of its own in the home folder, and says so.
            os.environ.setdefault("RAY_AUTH_MODE", "token")
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            import ray  # an extra of its own, and half a second
        except ImportError as error:
            raise InputError(
                "engine 'ray' needs Ray: pip install 'visual-token-compression[cluster]', or write engine: local"
            ) from error
        self._ray: Any = ray
        self._mine = not ray.is_initialized()
        if self._mine:
            self._connect(spec)
        try:
            threads, gpus = self._shares(spec)
            self._order = Order.of(spec, threads, known)
        except BaseException:
            self.close()
            raise
        self._actor = ray.remote(num_cpus=threads, num_gpus=gpus, max_restarts=0, max_task_retries=0)(Remote)

    def _connect(self, spec: SweepSpec) -> None:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if spec.address is None:
            count = max(cores(), spec.workers)
            quiet |= {"num_cpus": count, "include_dashboard": False, "object_store_memory": STORE_BYTES}
        else:
            quiet |= {"address": spec.address}
        try:
            try:
                self._ray.init(**quiet)
            except Exception:  # it gives itself thirty seconds to start, too few on a busy machine
                self._ray.shutdown()
                self._ray.init(**quiet)
        except Exception as error:
            where = "be started here" if spec.address is None else f"be reached at {spec.address!r}"
            raise InputError(f"Ray cannot {where} ({one_line(error)}); or write engine: local") from error

    def _shares(self, spec: SweepSpec) -> tuple[int, float]:
        """CPU threads and GPUs of each worker."""
        present = self._ray.cluster_resources()
        cpus, gpus = int(present.get("CPU", 0)), float(present.get("GPU", 0))
        wanted = gpus_each(spec, gpus, "this cluster")
        if spec.workers > cpus:
            raise InputError(
                f"--workers {spec.workers} need a CPU core each, and this cluster has {cpus}; give fewer --workers"
            )
        return max(1, cpus // spec.workers), wanted

    def start(self, worker: int, known: Mapping[str, Record]) -> Link:
        """Start an actor."""
        return _Actor(self._ray, self._actor.remote(self._order.knowing(known)))

    def ready(self, links: Sequence[Any]) -> Sequence[Any]:
        """Wait until an actor has said something, or is dead."""
        by_reference = {link.waits_for: link for link in links}
        found, _ = self._ray.wait(list(by_reference), num_returns=1)
        return [by_reference[reference] for reference in found]

    def close(self) -> None:
        """Leave the cluster; end it if it was started for this sweep."""
        if self._mine:
            self._ray.shutdown()


class _Actor:
    """One actor, with what it was asked and has not answered yet, in this order."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor = ray, actor
        self._asked: deque[Any] = deque([actor.begin.options(num_returns="streaming").remote()])

    @property
    def waits_for(self) -> Any:
        """The stream of answers that comes next."""
        return self._asked[0]

    def give(self, item: Item, following: Item | None) -> None:
        """Send an item."""
        self._asked.append(self._actor.run.options(num_returns="streaming").remote(item, following))

    def receive(self) -> Message | None:
        """What it said next; None at the end of a stream.

        Raises:
            Gone: it has ended.
        """
        try:
            reference = next(self._asked[0])
        except StopIteration:
            self._asked.popleft()
            return None
        try:
            message: Message = self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            raise Gone(f"Ray: {one_line(error)}") from error
        return message

    def end(self) -> None:
        """Kill it."""
        self._ray.kill(self._actor)
