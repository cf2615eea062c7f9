"""`python -m vtc.eval.training.atp_report`: the trained ATP weights against forms without training, as a page.

All forms prune the same model at the same layers and reach the same mean number of tokens, on scenes none has seen.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import tempfile
from pathlib import Path

import torch

import vtc
from vtc import adapters
from vtc.app.loading import load
from vtc.app.pages import page, table, wrapped
from vtc.eval.training.calibrations import calibrate_embedded
from vtc.eval.training.measure import Measurement, measure
from vtc.eval.training.prompts import plain_prompts
from vtc.eval.training.settings import asked, command
from vtc.method import learned, weights
from vtc.method.base import Compressor, ModelSpec
from vtc.methods.atp.method import ATP, ThresholdModule, ThresholdModules

WEIGHTS = ("atp-tiny-llava", "atp-tiny-llava-25", "atp-tiny-onevision")
"""Six layers, trained towards a third of the tokens and towards a quarter, and twelve layers."""
SEED = 200_000
"""First held-out scene; training, checks during training and the benchmark use others."""
OTHERS = ("same counts", "exact counts", "calibrated", "random modules")
"""The forms that the trained one is compared with."""


def random_modules(method: ATP, spec: ModelSpec, bias: float, seed: int = 0) -> ThresholdModules:
    """Modules with random instead of learned features; `bias` sets how much all of them keep."""
    torch.manual_seed(seed)
    module = method.build(spec)
    for part in module.atp.values():
        assert isinstance(part, ThresholdModule)
        torch.nn.init.xavier_uniform_(part.head_r.weight)
        torch.nn.init.constant_(part.head_r.bias, bias)
    return module


def trained_on(name: str) -> tuple[str, str]:
    """Model and task of a file of weights."""
    _, about = weights.read(name)
    return about["base_model"], json.loads(about["training"]).get("task", "tiny_image")


@torch.no_grad()
def random_form(method: ATP, on: tuple[str, str], retention: float, folder: Path, prompts: int = 60) -> ATP:
    """The method with random modules whose common bias is chosen so that training prompts keep `retention`."""
    loaded = load(on[0], device="cpu", dtype="float32")
    model = loaded.model
    spec, batches = adapters.of(model).spec, list(plain_prompts(loaded, asked(on[1]), prompts, 0))
    low, high = -6.0, 6.0
    for _ in range(12):
        bias = (low + high) / 2
        path = method.save(folder / "random.safetensors", random_modules(method, spec, bias), spec)
        form = dataclasses.replace(method, weights=str(path))
        with vtc.compress(model, form, trace=False) as handle:
            for batch in batches:
                model(**batch)
        low, high = (bias, high) if handle.stats.retention > retention else (low, bias)
    return form


def forms(name: str, reached: Measurement, folder: Path) -> dict[str, tuple[Compressor | None, float | None]]:
    """What is compared at the retention that the trained form reached, by label: a method and its budget."""
    trained, retention, (model, task) = learned.load(name), reached.retention, trained_on(name)
    assert isinstance(trained, ATP)
    layers = [stage - 1 for stage in trained.plan(adapters.of(load(model).model).spec).stages if isinstance(stage, int)]
    shared = {field: getattr(trained, field) for field in ("score_norm", "strides", "lambda_sample")}
    shared["layers"] = tuple(layers)
    file = folder / "constants.safetensors"
    constants = calibrate_embedded(file, "atp_training_free", retention, shared, model, task, device="cpu")
    shares = tuple(max(1e-6, reached.layers[layer + 1] / reached.tokens) for layer in layers)
    return {
        "untouched": (None, None),
        "trained": (trained, None),
        "same counts": (vtc.create("atp_training_free", **shared, shares=shares), None),
        "random modules": (random_form(trained, (model, task), retention, folder), None),
        "exact counts": (vtc.create("atp_training_free", **shared), retention),
        "calibrated": (vtc.create("atp_training_free", **shared, mode="calibrated", weights=str(constants)), None),
    }


def advantage(a: Measurement, b: Measurement) -> tuple[float, float]:
    """How much more often `a` is right than `b` on the same questions, and half of the 95 % interval."""
    pairs = [int(x) - int(y) for x, y in zip(a.right, b.right, strict=True)]
    mean = sum(pairs) / len(pairs)
    variance = sum((pair - mean) ** 2 for pair in pairs) / (len(pairs) - 1)
    return mean, 1.96 * math.sqrt(variance / len(pairs))


def compare(name: str, per_family: int, folder: Path, first_seed: int = SEED) -> dict[str, Measurement]:
    """Measure the trained weights, then every other form at the retention they reached."""
    model, task = trained_on(name)
    trained = measure(model, learned.load(name), None, per_family, task=task, first_seed=first_seed)
    found = {"trained": trained}
    for label, (method, budget) in forms(name, trained, folder).items():
        if label != "trained":
            found[label] = measure(model, method, budget, per_family, task=task, first_seed=first_seed)
    order = ("untouched", "trained", *OTHERS)
    return {label: found[label] for label in order}


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def section(name: str, found: dict[str, Measurement]) -> str:
    """What was measured about one set of weights, in Markdown."""
    _, about = weights.read(name)
    run = json.loads(about["training"])
    families = [family for family in found["trained"].accuracy if family != "mean"]
    accuracy = [[label, *(_percent(m.accuracy[f]) for f in (*families, "mean"))] for label, m in found.items()]
    kept = [[label, _percent(m.retention), _percent(m.spread), *(_percent(m.kept_by_family()[f]) for f in families)]
            for label, m in found.items() if label != "untouched"]  # fmt: skip
    depth = len(found["trained"].layers)
    layers = [[label, *(f"{n:.1f}" for n in m.layers)] for label, m in found.items() if label != "untouched"]
    gains = []
    for label in OTHERS:
        mean, half = advantage(found["trained"], found[label])
        gains.append([label, f"{100 * mean:+.1f}", f"{100 * (mean - half):+.1f} to {100 * (mean + half):+.1f}"])
    target = run["parameters"]["target_tokens"]
    return "\n\n".join([
        f"## `{name}`: trained towards a mean of {target:g} of {found['trained'].tokens:.0f} tokens",
        wrapped(f"{len(found['trained'].right)} questions of {trained_on(name)[1]} about held-out samples, "
                f"{about['base_model']}. {run['steps']} updates of {run['batch_size']} questions on {about['data']}, "
                f"{about['seconds']} s on one busy CPU core:"),
        f"    {command(run)}",
        "Right answers in percent:",
        table(["form", *families, "mean"], accuracy),
        "The trained form against the others on the same questions, in points, with the 95 % interval:",
        table(["against", "points", "interval"], gains),
        wrapped("""Visual tokens kept in percent, mean over the LLM's layers; "spread" is the standard deviation over
        the questions, the families' columns show where the tokens went:"""),
        table(["form", "kept", "spread", *families], kept),
        "Visual tokens that enter each layer:",
        table(["form", *(f"layer {n}" for n in range(depth))], layers),
    ])  # fmt: skip


ABOUT = """questions about held-out samples, models in float32, greedy answers, exact match. The modules were trained
with the model frozen."""
FORMS = """"trained" sets its thresholds by the learned modules. The other forms prune at the same layers by the same
scores and reach the same mean: "same counts" keeps behind each layer as many tokens as the trained form does on
average, for all questions alike, so what it lacks is what the thresholds gain by following the sample; "exact counts"
is `atp_training_free` with its decaying counts; "calibrated" has constant thresholds from 200 training prompts;
"random modules" is the learned form with random features and one common bias."""


def report(found: dict[str, dict[str, Measurement]], per_family: int) -> str:
    """The page in Markdown; found: weights -> form -> measurement."""
    return page(
        "ATP on embedded models, with and without training",
        f"python -m vtc.eval.training.atp_report --per-family {per_family}",
        ABOUT,
        wrapped(FORMS),
        *(section(name, measured) for name, measured in found.items()),
    )


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description="Measure the trained ATP weights and write the page about them.")
    parser.add_argument("--weights", nargs="+", default=WEIGHTS, help="embedded names or files")
    parser.add_argument("--per-family", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("docs/results/atp.md"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = {name: compare(name, given.per_family, Path(folder)) for name in given.weights}
    given.out.write_text(report(found, given.per_family))
    sys.stdout.write(f"{given.out}\n")


if __name__ == "__main__":
    main()
