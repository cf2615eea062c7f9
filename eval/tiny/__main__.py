"""`python -m vtc.eval.tiny`."""

from __future__ import annotations

import sys

from vtc.cli.main.tiny import app
from vtc.errors import VTCError

if __name__ == "__main__":
    try:
        app(prog_name="python -m vtc.eval.tiny")
    except VTCError as error:
        sys.exit(f"error: {error}")
