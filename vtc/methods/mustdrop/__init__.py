"""MustDrop (`method.py`), its uniform windows (`windows.py`) and the two attention scores (`dual.py`)."""

from __future__ import annotations

from vtc.methods.mustdrop.method import MustDrop as MustDrop
