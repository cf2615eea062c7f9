"""`python -m vtc.testing [MODEL ...]` runs the whole contract and prints it as Markdown tables."""

from __future__ import annotations

import sys

import torch
import transformers

from vtc.registry import list_methods
from vtc.testing.contract import Deviation, check_adapter, check_method
from vtc.testing.models import TINY_MODELS


def main(models: list[str]) -> None:
    """Check every method and every stage on `models`; a table per model, worst deviation per method and check."""
    torch.set_num_threads(1)
    print("# Contract: worst difference of logits per cell\n")
    print("Made by `python -m vtc.testing`. float32, one CPU thread, tiny random models, 8 decode steps. Bit-identical")
    print("checks show 0; `fixed_keep` and `last_row_top_k` are probes that act inside the LLM and after the prefill.")
    print(f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}.")
    for model in models:
        cells = [cell for method in list_methods() for cell in check_method(method, models=[model])]
        cells += check_adapter(model)
        methods = list(dict.fromkeys(cell.method for cell in cells))
        print(f"\n## {model}\n")
        print("| check | limit | " + " | ".join(methods) + " |")
        print("|---" * (len(methods) + 2) + "|")
        for check in dict.fromkeys(cell.check for cell in cells):
            limit = max(cell.limit for cell in cells if cell.check == check)
            values = [_worst(cells, check, model, method) for method in methods]
            print(f"| {check} | {limit:.0e} | " + " | ".join(values) + " |", flush=True)


def _worst(cells: list[Deviation], check: str, model: str, method: str) -> str:
    found = [cell.worst for cell in cells if (cell.check, cell.model, cell.method) == (check, model, method)]
    if not found:
        return "-"
    return f"{max(found):.1e}" if max(found) else "0"


if __name__ == "__main__":
    main(sys.argv[1:] or list(TINY_MODELS))
