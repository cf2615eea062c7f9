"""What a task's code asks of the world outside this process: servers and programs.

A judge or an evaluation server must not be called for a rehearsal, nor two thousand times for a bootstrap. Which code
calls one cannot be read off a task's settings, so it is watched while it runs. Libraries try again for minutes what a
machine without a network cannot do; here they hear so at once.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtc.eval.scoped import Function, Mine, replaced

KEY = re.compile(r"""(?:getenv|environ(?:\.get)?)\s*[(\[]\s*["'](\w*API_KEY\w*)["']""")
LOCAL_PAUSE = 0.01  # seconds; nothing that no server is asked for has to wait longer
PATIENCE = 2.0
"""Seconds that servers may take to be found and to accept a connection, all of them together."""


@dataclass
class Calls:
    """servers: hosts that were looked up or connected to, in order, with the port. keys: environment variables in which
    the code on the way there looks for an API key. programs: what was started. reached: servers that a connection was
    made to; `unreachable` are the others."""

    servers: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, None] = field(default_factory=dict)
    programs: dict[str, None] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.servers or self.programs)

    @property
    def unreachable(self) -> list[str]:
        """Servers that nothing was connected to."""
        return [host for host in self.servers if host not in self.reached]


@contextmanager
def watching(*, refuse: bool = False, patience: float | None = None) -> Iterator[Calls]:
    """Note what the body's thread, and those it starts, ask for; other threads go about their business.

    refuse: no connection is made, it fails as on a machine without a network. patience: seconds that servers which do
    not answer may take, all together; what has failed once fails at once afterwards. With either, pauses between
    attempts are cut short unless a server has been reached. Programs are started either way.
    """
    calls, mine = Calls(), Mine()
    left, names, failed = _Budget(patience), dict[str, str](), dict[str, OSError]()

    def ask(host: str, port: Any, key: str, question: Callable[[], Any]) -> Any:
        calls.servers.setdefault(host, port)
        calls.keys.update(dict.fromkeys(_keys_on_the_way()))
        if refuse:
            raise socket.gaierror(socket.EAI_AGAIN, f"{host!r} is not asked in a rehearsal")
        if patience is None:
            return question()
        if key in failed:
            raise failed[key]
        try:
            with left.used():
                return question()
        except BlockingIOError:  # a loop that waits for many sockets at once asks for it
            raise
        except OSError as error:
            failed[key] = error
            raise

    def look_up(below: Function) -> Function:
        def call(host: Any, port: Any = None, *args: Any, **kwargs: Any) -> Any:
            name = host.decode() if isinstance(host, bytes) else str(host)

            def question() -> Any:
                if patience is None:
                    return below(host, port, *args, **kwargs)
                return _within(left.seconds, lambda: below(host, port, *args, **kwargs))

            found = ask(name, port, name, question)
            names.update((str(entry[4][0]), name) for entry in found)
            return found

        return call

    def connect(below: Function) -> Function:
        def call(self: socket.socket, address: Any) -> Any:
            if self.family not in (socket.AF_INET, socket.AF_INET6):  # another process of this machine
                return below(self, address)
            host = names.get(str(address[0]), str(address[0]))
            before = self.gettimeout()
            if patience is not None and before != 0.0:
                self.settimeout(left.seconds if before is None else min(left.seconds, before))
            try:
                answer = ask(host, address[1], f"{address[0]}:{address[1]}", lambda: below(self, address))
                calls.reached.add(host)
                return answer
            finally:
                self.settimeout(before)

        return call

    def program(below: Function) -> Function:
        def start(self: Any, args: Any, *rest: Any, **kwargs: Any) -> None:
            first = args if isinstance(args, str | bytes | Path) else next(iter(args))
            calls.programs.setdefault(str(first))
            below(self, args, *rest, **kwargs)

        return start

    def sleep(below: Function) -> Function:
        cut = (refuse or patience is not None) and not calls.reached
        return lambda seconds: below(min(seconds, LOCAL_PAUSE) if cut else seconds)

    with ExitStack() as stack:
        for owner, name, layer in (
            (socket, "getaddrinfo", look_up),
            (socket.socket, "connect", connect),
            (subprocess.Popen, "__init__", program),
            (time, "sleep", sleep),
        ):
            stack.enter_context(replaced(owner, name, layer, mine))
        yield calls


def reachable(host: str, port: Any, patience: float = PATIENCE) -> str | None:
    """None where `host` accepts a connection within `patience` seconds, otherwise why it does not."""
    try:
        with watching(patience=patience):
            socket.create_connection((host, port or 443), timeout=patience).close()
    except OSError as error:
        return str(error)
    return None


class _Budget:
    """Seconds that waiting for servers may take in all."""

    def __init__(self, seconds: float | None) -> None:
        self.total, self.spent = seconds or 0.0, 0.0

    @property
    def seconds(self) -> float:
        return max(self.total - self.spent, LOCAL_PAUSE)

    @contextmanager
    def used(self) -> Iterator[None]:
        """What fails in here counts; servers that answer may be as many as they like."""
        began = time.monotonic()
        try:
            yield
        except OSError:
            self.spent += time.monotonic() - began
            raise


def _within(seconds: float, function: Callable[[], Any]) -> Any:
    """What `function` returns or raises; after so many seconds TimeoutError, and it goes on where nobody awaits it."""
    answers: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            answers.append((True, function()))
        except BaseException as error:  # handed to the caller
            answers.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not answers:
        raise TimeoutError(f"no answer within {seconds:.1f} s")
    fine, answer = answers[0]
    if not fine:
        raise answer
    return answer


def _keys_on_the_way() -> list[str]:
    """Environment variables with API keys that the modules of the running functions read."""
    frame, files = sys._getframe(1), dict[str, None]()
    while frame is not None:
        files.setdefault(frame.f_code.co_filename)
        frame = frame.f_back  # type: ignore[assignment]
    keys = []
    for file in files:
        try:
            keys += KEY.findall(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            continue
    return keys
