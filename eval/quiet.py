"""Keep lmms-eval, datasets and tqdm off the terminal, so that stdout stays free for results."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Swallow what the body prints, progress bars included.

    lmms-eval binds its log sink to `sys.stdout` when it is imported. Importing it first, with stdout pointing at
    stderr, makes its warnings appear there even while the body is muted.
    """
    with contextlib.redirect_stdout(sys.stderr):
        import lmms_eval.models  # noqa: F401
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
