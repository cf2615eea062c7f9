"""VQToken (`method.py`), its codebook alone (`codebook.py`), clustering (`cluster.py`) and the learned attention
(`attention.py`).
"""

from __future__ import annotations

from vtc.methods.vqtoken.codebook import VQTokenCodebook as VQTokenCodebook
from vtc.methods.vqtoken.method import VQToken as VQToken
