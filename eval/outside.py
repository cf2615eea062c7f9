"""What a task's scoring code asks of the world outside this process: servers and programs.

A judge or an evaluation server must not be called for a rehearsal, nor two thousand times for a bootstrap. Which code
calls one cannot be read off a task's settings, so it is watched while it runs.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

KEY = re.compile(r"""(?:getenv|environ(?:\.get)?)\s*[(\[]\s*["'](\w*API_KEY\w*)["']""")
LOCAL_PAUSE = 0.01  # seconds; nothing that is rehearsed has to wait longer


@dataclass
class Calls:
    """servers: host names that were looked up or connected to, in order. keys: environment variables in which the
    code on the way there looks for an API key. programs: what was started."""

    servers: dict[str, None] = field(default_factory=dict)
    keys: dict[str, None] = field(default_factory=dict)
    programs: dict[str, None] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.servers or self.programs)


@contextmanager
def watching(*, refuse: bool = False) -> Iterator[Calls]:
    """Note what the body's thread, and those it starts, ask for; other threads go about their business.

    refuse: no connection is made, it fails as on a machine without a network, and pauses between attempts are cut
    short. Programs are started either way.
    """
    calls = Calls()
    others = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}

    def server(original: Callable[..., Any], host_of: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            host = None if threading.get_ident() in others else host_of(*args)
            if host is not None:
                calls.servers.setdefault(host)
                calls.keys.update(dict.fromkeys(_keys_on_the_way()))
                if refuse:
                    raise socket.gaierror(socket.EAI_AGAIN, f"{host!r} is not asked in a rehearsal")
            return original(*args, **kwargs)

        return call

    def program(self: Any, args: Any, *rest: Any, **kwargs: Any) -> None:
        if threading.get_ident() not in others:
            first = args if isinstance(args, str | bytes | Path) else next(iter(args))
            calls.programs.setdefault(str(first))
        start(self, args, *rest, **kwargs)

    def sleep(seconds: float) -> None:
        pause(seconds if threading.get_ident() in others else min(seconds, LOCAL_PAUSE))

    start, pause = subprocess.Popen.__init__, time.sleep
    with (
        mock.patch.object(socket, "getaddrinfo", server(socket.getaddrinfo, lambda host, *_: str(host))),
        mock.patch.object(socket.socket, "connect", server(socket.socket.connect, _address)),
        mock.patch.object(subprocess.Popen, "__init__", program),
        mock.patch.object(time, "sleep", sleep if refuse else pause),
    ):
        yield calls


def _address(self: socket.socket, address: Any, *_: Any) -> str | None:
    """The host of an address on a network; sockets of this machine's processes have none."""
    return str(address[0]) if self.family in (socket.AF_INET, socket.AF_INET6) else None


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
