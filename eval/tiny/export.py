"""A trained model as a folder that transformers loads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from vtc.eval.tiny.processor import build_processor


def export(model: Any, folder: Path, processor: Any = None) -> None:
    """Write weights in fp16, configuration, generation settings, tokenizer, image processor and chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    half = copy.deepcopy(model).cpu().half()
    half.config._attn_implementation = "sdpa"
    half.save_pretrained(folder)
    (processor or build_processor()).save_pretrained(folder)
