"""`python -m vtc.testing.graphs` counts the graphs that torch.compile builds while the retention goes from 0.1 to 0.9.

The prompt stays the same, so that the number of kept tokens is all that changes. The back end is dynamo's "eager": what
is counted is how often a shape asks for another graph, which does not depend on what is generated from it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from vtc.app.pages import page, wrapped
from vtc.engine.attach import compress
from vtc.method.budget import tokens_to_keep
from vtc.testing.models import tiny_inputs, tiny_model

MODEL, METHOD, TOKENS, BUCKET = "llava-clip", "vtc_cls", 16, 4
RETENTIONS = tuple(round(0.1 * step, 1) for step in range(1, 10))
LAYOUT: list[list[Any]] = [[4, "image", 5]]
DYNAMIC: dict[str, bool | None] = {"dynamic=True": True, "default": None, "dynamic=False": False}


def exactly(retention: float) -> int:
    """The tokens that a retention keeps."""
    return tokens_to_keep(TOKENS, retention)


def in_buckets(retention: float) -> int:
    """The same, rounded up to a multiple of `BUCKET`."""
    return -(-exactly(retention) // BUCKET) * BUCKET


@torch.no_grad()
def graphs(dynamic: bool | None, keep: Callable[[float], int], *, layers: bool) -> tuple[int, int, int]:
    """Different numbers of kept tokens, graphs built over all retentions, and graph breaks.

    layers: compile the forward of every LLM layer instead of that of the language model.
    """
    model = tiny_model(MODEL)
    inputs = tiny_inputs(MODEL, LAYOUT, model=model)
    language: Any = model.model.language_model
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for module in language.layers if layers else [language]:
        module.forward = torch.compile(module.forward, backend="eager", dynamic=dynamic)
    limits: dict[str, Any] = {"recompile_limit": 1000, "accumulated_recompile_limit": 1000}
    # The default limit of 8 would run what exceeds it without compiling it.
    with torch._dynamo.config.patch(limits), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for retention in RETENTIONS:
            with compress(model, METHOD, keep=keep(retention), trace=False):
                model(**inputs)
    counters = torch._dynamo.utils.counters
    found = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    torch._dynamo.reset()
    return len(set(map(keep, RETENTIONS))), *found


def report(rows: Iterable[Sequence[str]]) -> str:
    """The document around the rows."""
    about = f"""{METHOD} on a tiny LLaVA of {TOKENS} visual tokens and 4 layers, one prompt, the prefill alone, at the
    retentions {RETENTIONS[0]} to {RETENTIONS[-1]} one behind the other; back end "eager" of dynamo, its limit of
    recompilations raised."""
    head = "compiled", "torch.compile", "kept tokens", "different numbers", "graphs", "graph breaks"
    words = """With dynamic shapes the retention costs no graph: the first ones serve all. With static shapes every
    number of kept tokens asks for one. Rounding the count up to a multiple leaves as many graphs as there are
    multiples, and is what `keep=` does when it is given multiples; there is no option of its own for it, because the
    length that a graph is built for is that of the whole row, text included, which varies from prompt to prompt as
    well."""
    title, command = "Graphs of torch.compile over retentions", "python -m vtc.testing.graphs"
    return page(title, command, about, (head, rows), wrapped(words), packages=("torch", "transformers"))


def main() -> None:
    """Print the document."""
    torch.set_num_threads(1)
    rows = []
    for layers, what in ((False, "language model's forward"), (True, "each layer's forward")):
        for label, dynamic in DYNAMIC.items():
            for keep, kept in ((exactly, "as the retention says"), (in_buckets, f"multiples of {BUCKET}")):
                rows.append([what, label, kept, *map(str, graphs(dynamic, keep, layers=layers))])
                print(*rows[-1], file=sys.stderr, flush=True)
    sys.stdout.write(report(rows))


if __name__ == "__main__":
    main()
