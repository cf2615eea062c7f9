"""Keep lmms-eval, datasets and tqdm off the terminal, so that stdout stays free for results."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Swallow what the body prints, progress bars included, and keep the process's own `os.environ`.

    lmms-eval binds its log sink to `sys.stdout` when it is imported. Importing it first, with stdout pointing at
    stderr, makes its warnings appear there even while the body is muted.
    """
    with contextlib.redirect_stdout(sys.stderr):
        import lmms_eval.models  # noqa: F401
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), _own_environment():
        yield


@contextlib.contextmanager
def _own_environment() -> Iterator[None]:
    """Put `os.environ` back, with the values it has in the end.

    `datasets.Dataset.map` with several processes leaves a copy in its place, which libraries that hold the first one,
    rich among them, never see.
    """
    own = os.environ
    try:
        yield
    finally:
        if os.environ is not own:
            now = dict(os.environ)
            os.environ = own  # noqa: B003 - the object that it was
            for name in set(own) - set(now):
                del own[name]
            own.update(now)
