"""The page docs/results/vqtoken.md: VQToken's trained block against the same clusters without it, on held-out scenes.

`python -m vtc.eval.training.vqtoken_report [--out FILE] [--plain WEIGHTS]` measures everything and writes the page.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vtc import adapters, create, weights
from vtc.compressor import Compressor
from vtc.eval.tiny.layout import VISUAL_TOKENS
from vtc.eval.training.measure import Measurement, measure
from vtc.learned import LearnedCompressor

MODEL, EMBEDDED = "tiny-llava", "vqtoken-tiny-llava"
BUDGETS = (6, 12, 24, 48)
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


def untrained(source: str, folder: Path) -> LearnedCompressor:
    """The same block with random weights and published gains, so that a residual block does not begin as nothing."""
    from vtc.loading import load

    torch.manual_seed(0)
    method = create("vqtoken", **parameters(source), training=True)
    assert isinstance(method, LearnedCompressor)
    spec = adapters.of(load(MODEL, dtype="float32").model).spec
    module = method.module(spec)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("norm3.weight"):
                parameter.fill_(1.0)
    path = method.save(folder / "random.safetensors", module, spec)
    return create("vqtoken", **parameters(source), weights=str(path))  # type: ignore[return-value]


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
        found.append(("vqtoken, the same with random weights", "12", run(untrained(EMBEDDED, Path(folder)), 12)))
    if plain is not None:
        found.append(("vqtoken, plain block (no residual), trained", "12", run(trained(plain), 12)))
    return found


def page(found: Sequence[tuple[str, str, Measurement]], plain: str | None) -> str:
    """The text of the page."""
    _, about = weights.read(EMBEDDED)
    settings = json.loads(about["training"])
    lines = [
        "# VQToken on the embedded model",
        "",
        "Written by `python -m vtc.eval.training.vqtoken_report`. Accuracy in percent on the questions of the split",
        f'"benchmark" ({len(found[0][2].right)} questions in nine families, scenes never seen in training), mean over',
        f"the families, {MODEL}, float32 on the CPU. Tokens: visual tokens that enter the LLM, of {VISUAL_TOKENS}.",
        "",
        "| method | tokens | mean | " + " | ".join(FAMILIES) + " |",
        "|---|---|---|" + "---|" * len(FAMILIES),
    ]
    for name, tokens, result in found:
        shares = [result.accuracy["mean"], *(result.accuracy[family] for family in FAMILIES)]
        lines.append(f"| {name} | {tokens} | " + " | ".join(f"{100 * share:.1f}" for share in shares) + " |")
    chosen = ", ".join(f"{key}={value!r}" for key, value in settings["parameters"].items())
    lines += [
        "",
        f"The embedded weights `{EMBEDDED}` ({chosen}) were trained with {settings['steps']} steps of",
        f"{settings['batch_size']} questions at {round(VISUAL_TOKENS * settings['retention'])} tokens, on",
        f"{settings['scenes']} scenes, rate {settings['rate']:g}, in {about['seconds']} s; language model, tower and",
        "projector were frozen. One block serves every budget: nothing in it depends on the number of clusters.",
        "",
        "Why this form. An image is one frame, so the published block has a single query and all its output rows are",
        'equal. `queries="line"` gives twelve queries, but the block then has to invent tokens that a frozen language',
        "model understands, from numbers that are arbitrary. The embedded block is residual instead: it begins as the",
        'codebook alone and learns what to add, and `queries="cluster"` tells every code where its tokens were.',
        "Both are departures from the paper, which fine-tunes the language model together with the block.",
    ]
    if plain is not None:
        _, about = weights.read(plain)
        settings = json.loads(about["training"])
        chosen = ", ".join(f"{key}={value!r}" for key, value in settings["parameters"].items())
        lines += [
            "",
            f"The plain block ({chosen}) had {settings['steps']} steps of {settings['batch_size']} questions; its",
            "weights are not part of the repository.",
        ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="measure VQToken's trained block and write the page")
    parser.add_argument("--out", type=Path, default=Path("docs/results/vqtoken.md"))
    parser.add_argument("--plain", help="weights of a block without residual, for one more line")
    parser.add_argument("--per-family", type=int, default=80)
    given = parser.parse_args(arguments)
    text = page(rows(given.plain, given.per_family, BUDGETS), given.plain)
    given.out.write_text(text)


if __name__ == "__main__":
    main()
