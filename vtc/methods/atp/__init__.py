"""ATP-LLaVA (`method.py`), its form without training (`training_free.py`)
and what both do with thresholds (`thresholds.py`).
"""

from __future__ import annotations

from vtc.methods.atp.method import ATP as ATP
from vtc.methods.atp.training_free import ATPTrainingFree as ATPTrainingFree
