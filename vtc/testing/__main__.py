"""`python -m vtc.testing [MODEL ...]` runs the whole contract and prints it as a Markdown table."""

from __future__ import annotations

import sys

import torch
import transformers

from vtc.registry import list_methods
from vtc.testing.contract import Deviation, check_adapter, check_method
from vtc.testing.models import TINY_MODELS


def main(models: list[str]) -> None:
    """Check every method and every stage on `models`; one line per method and model, worst deviation per kind."""
    torch.set_num_threads(1)
    cells: list[Deviation] = []
    for model in models:
        for method in list_methods():
            cells += check_method(method, models=[model])
        cells += check_adapter(model)
    checks = list(dict.fromkeys(cell.check for cell in cells))
    rows = list(dict.fromkeys((cell.model, cell.method) for cell in cells))
    print("# Contract: worst difference of logits per cell\n")
    print("Made by `python -m vtc.testing`. float32, one CPU thread, tiny random models, 8 decode steps. Bit-identical")
    print("checks show 0; `fixed_keep` and `last_row_top_k` are probes that act inside the LLM and after the prefill.")
    print(f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}.\n")
    print("| check | limit | " + " | ".join(f"{method}, {model}" for model, method in rows) + " |")
    print("|---" * (len(rows) + 2) + "|")
    for check in checks:
        limit = max(cell.limit for cell in cells if cell.check == check)
        values = [_worst(cells, check, model, method) for model, method in rows]
        print(f"| {check} | {limit:.0e} | " + " | ".join(values) + " |")


def _worst(cells: list[Deviation], check: str, model: str, method: str) -> str:
    found = [cell.worst for cell in cells if (cell.check, cell.model, cell.method) == (check, model, method)]
    if not found:
        return "-"
    return f"{max(found):.1e}" if max(found) else "0"


if __name__ == "__main__":
    main(sys.argv[1:] or list(TINY_MODELS))
