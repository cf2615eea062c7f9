"""The page docs/results/vqtoken.md: VQToken's trained block against the same clusters without it, on held-out scenes.

`python -m vtc.eval.training.vqtoken_report [--out FILE] [--plain WEIGHTS]` measures everything and writes the page.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vtc import adapters, create
from vtc.app.loading import load
from vtc.app.pages import page, wrapped
from vtc.eval.tiny.layout import VISUAL_TOKENS
from vtc.eval.training.measure import Measurement, measure
from vtc.eval.training.settings import command
from vtc.method import weights
from vtc.method.base import Compressor
from vtc.method.learned import LearnedCompressor

MODEL, EMBEDDED = "tiny-llava", "vqtoken-tiny-llava"
BUDGETS = (6, 12, 24)
FAMILIES = ("existence", "colour", "shape", "counting", "relation", "referring", "location", "digits", "words")


def parameters(source: str) -> dict[str, Any]:
    """The hyper-parameters that weights were trained with."""
    stored: dict[str, Any] = json.loads(weights.read(source)[1]["training"])["parameters"]
    return stored


def trained(source: str) -> LearnedCompressor:
    """VQToken as its weights want it."""
    method = create("vqtoken", **parameters(source), weights=source)
    assert isinstance(method, LearnedCompressor)
    return method


def untrained(source: str, folder: Path, **changes: Any) -> LearnedCompressor:
    """The same block with random weights and gains of one, so that a residual block does not begin as nothing."""
    torch.manual_seed(0)
    method = create("vqtoken", **{**parameters(source), **changes}, training=True)
    assert isinstance(method, LearnedCompressor)
    spec = adapters.of(load(MODEL, dtype="float32").model).spec
    module = method.module(spec)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("norm3.weight"):
                parameter.fill_(1.0)
    path = method.save(folder / "random.safetensors", module, spec)
    return dataclasses.replace(method, training=False, weights=str(path))


def rows(plain: str | None, per_family: int, budgets: Sequence[int]) -> list[tuple[str, str, Measurement]]:
    """(method, tokens, result) of every line of the table."""

    def run(method: Compressor | None, keep: int = VISUAL_TOKENS) -> Measurement:
        share = None if method is None else keep / VISUAL_TOKENS
        return measure(MODEL, method, share, per_family, split="benchmark", first_seed=0)

    found = [("uncompressed", str(VISUAL_TOKENS), run(None))]
    for keep in budgets:
        found.append(("vqtoken_codebook", str(keep), run(create("vqtoken_codebook"), keep)))
        found.append((f"vqtoken, {EMBEDDED}", str(keep), run(trained(EMBEDDED), keep)))
    with tempfile.TemporaryDirectory() as folder:
        for words, residual in (("the same block, random weights", True), ("plain block, random weights", False)):
            method = untrained(EMBEDDED, Path(folder), residual=residual)
            found.append((f"vqtoken, {words}", "12", run(method, 12)))
    if plain is not None:
        found.append(("vqtoken, plain block, trained", "12", run(trained(plain), 12)))
    return found


ABOUT = """accuracy in percent on the questions of the split "benchmark" ({questions} questions in nine families,
scenes never seen in training), mean over the families, {model}, float32 on the CPU. Tokens: visual tokens that enter
the LLM, of {tokens}."""
ORIGIN = """The embedded weights `{name}` come from {steps} steps of {batch_size} questions at {tokens} tokens,
{seconds} s on a shared CPU, while the language model, the tower and the projector were frozen:"""
REMARKS = (
    """One block serves every budget: nothing in it depends on the number of clusters. With random weights a residual
    block disturbs the codes little (they are longer than its outputs), so what training gives is the distance to the
    codes alone and to that line; a plain block with random weights is useless.""",
    """Why this form. An image is one frame, so the published block has a single query and all its output rows are
    equal. `queries="line"` gives twelve queries, but the block then has to invent tokens that a frozen language model
    understands, from numbers that are arbitrary. The embedded block is residual instead: it begins as the codebook
    alone and learns what to add, and `queries="cluster"` tells every code where its tokens were. Both are departures
    from the paper, which fine-tunes the language model together with the block.""",
)
PLAIN = "The plain block was trained in the same way but without residual; its weights are not in the repository:"


def report(found: Sequence[tuple[str, str, Measurement]], plain: str | None) -> str:
    """The text of the page."""
    _, about = weights.read(EMBEDDED)
    settings = json.loads(about["training"])
    columns = ("mean", *FAMILIES)
    cells = [[name, tokens, *result.percents(columns)] for name, tokens, result in found]
    trained_at = round(VISUAL_TOKENS * settings["retention"])
    origin = ORIGIN.format(name=EMBEDDED, **{**settings, "tokens": trained_at, "seconds": about["seconds"]})
    parts = [wrapped(origin), _code(command(settings)), *map(wrapped, REMARKS)]
    if plain is not None:
        parts += [PLAIN, _code(command(json.loads(weights.read(plain)[1]["training"])))]
    given = ABOUT.format(questions=len(found[0][2].right), model=MODEL, tokens=VISUAL_TOKENS)
    made_by = "python -m vtc.eval.training.vqtoken_report"
    return page("VQToken on the embedded model", made_by, given, (["method", "tokens", *columns], cells), *parts)


def _code(text: str) -> str:
    return f"```\n{text}\n```"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="measure VQToken's trained block and write the page")
    parser.add_argument("--out", type=Path, default=Path("docs/results/vqtoken.md"))
    parser.add_argument("--plain", help="weights of a block without residual, for one more line")
    parser.add_argument("--per-family", type=int, default=80)
    given = parser.parse_args(arguments)
    given.out.write_text(report(rows(given.plain, given.per_family, BUDGETS), given.plain))


if __name__ == "__main__":
    main()
