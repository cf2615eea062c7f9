"""GlobalCom2 (`method.py`) and the shares of an image's crops (`crops.py`)."""

from __future__ import annotations

from vtc.methods.globalcom2.method import GlobalCom2 as GlobalCom2
