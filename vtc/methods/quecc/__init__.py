"""QueCC (`method.py`), how its blocks lie (`blocks.py`) and the learned attention over them (`attention.py`)."""

from __future__ import annotations

from vtc.methods.quecc.method import QueCC as QueCC
