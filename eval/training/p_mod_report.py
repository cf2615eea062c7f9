"""The page docs/results/p_mod.md: p-MoD's trained routers against none, and against other rankings, on held-out scenes.

`python -m vtc.eval.training.p_mod_report [--out FILE] [--per-family N]` measures everything and writes the page.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vtc import adapters, create
from vtc.app.loading import load
from vtc.app.pages import page, wrapped
from vtc.eval.tiny.layout import VISUAL_TOKENS
from vtc.eval.training.measure import Measurement, measure
from vtc.eval.training.settings import command
from vtc.eval.training.vqtoken_report import FAMILIES
from vtc.method import weights
from vtc.method.base import Compressor
from vtc.methods.p_mod import PMoD

MODEL, EMBEDDED = "tiny-llava", "p_mod-tiny-llava"
RETENTIONS = (0.33, 0.4, 0.5)
Line = tuple[str, str, Measurement]
"""Method, retention, result."""
ABOUT = """accuracy in percent on the questions of the split "benchmark" ({questions} questions in nine families, scenes
never seen in training), mean over the families, {model}, float32 on the CPU. Retention: of {tokens} visual tokens, mean
over the LLM's six layers of those that go through a layer; `random` drops before the LLM."""
ORIGIN = """The embedded weights `{name}` come from {steps} steps of {batch_size} questions at retention {retention},
{seconds} s on a shared CPU, while everything else was frozen:"""
REMARKS = """Zero routers let the first tokens of a picture through, every layer the same ones. The router of the last
layer stays zero in training, since nothing reads what leaves that layer of visual tokens. Trained routers see no
question, `ranked_routing` follows it. More training is not better: the loss knows how much a token counts, not what
changes when another one goes through, and with `--steps 200 --warmup 10` the same command ended with worse routers."""


def untrained(folder: Path) -> PMoD:
    """p_mod with zero routers."""
    method, spec = PMoD(training=True), adapters.of(load(MODEL, dtype="float32").model).spec
    return PMoD(weights=str(method.save(folder / "zeros.safetensors", method.module(spec), spec)))


def lines(retentions: Sequence[float], per_family: int) -> list[Line]:
    """What the table shows."""

    def run(method: Compressor | None, retention: float | None = None) -> Measurement:
        return measure(MODEL, method, retention, per_family, split="benchmark", first_seed=0)

    found = [("uncompressed", "1", run(None))]
    with tempfile.TemporaryDirectory() as folder:
        arms = {
            f"p_mod, {EMBEDDED}": create("p_mod", weights=EMBEDDED),
            "p_mod, zero routers": untrained(Path(folder)),
            "ranked_routing": create("ranked_routing"),
            "random": create("random"),
        }
        for share in retentions:
            found += [(name, str(share), run(method, share)) for name, method in arms.items()]
    return found


def report(found: Sequence[Line]) -> str:
    """The text of the page."""
    _, about = weights.read(EMBEDDED)
    settings, columns = json.loads(about["training"]), ("mean", *FAMILIES)
    cells = [[name, at, *result.percents(columns)] for name, at, result in found]
    given = ABOUT.format(questions=len(found[0][2].right), model=MODEL, tokens=VISUAL_TOKENS)
    origin = ORIGIN.format(name=EMBEDDED, **{**settings, "seconds": about["seconds"]})
    table = ["method", "retention", *columns], cells
    parts = wrapped(origin), f"```\n{command(settings)}\n```", wrapped(REMARKS)
    return page("p-MoD on the embedded model", "python -m vtc.eval.training.p_mod_report", given, table, *parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="measure p-MoD's trained routers and write the page")
    parser.add_argument("--out", type=Path, default=Path("docs/results/p_mod.md"))
    parser.add_argument("--per-family", type=int, default=40)
    given = parser.parse_args(arguments)
    given.out.write_text(report(lines(RETENTIONS, given.per_family)))


if __name__ == "__main__":
    main()
