"""`python -m vtc.testing.overhead` compares a compressed prefill with the same model on a natively short sequence.

Three arms run interleaved in one process on one random LLaMA-sized stack: the whole prompt, the prompt compressed by a
method, and a prompt that was as short from the start (its embeddings fed directly, behind the same encoding of the
pictures). The tower is shallow, so that the figures are about the language model. Medians; the natively short prompt is
the limit.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from vtc.app.pages import page
from vtc.engine.attach import compress
from vtc.errors import BudgetError, VTCError
from vtc.method.registry import METHODS
from vtc.testing.family import IMAGE, text_settings

SIDE, PATCH, TEXT = 336, 14, 40
HIDDEN, LAYERS = 512, 8
WARM, FULL = 2, 3
"""Rounds that warm up; rounds in which the whole prompt is measured too, which no ratio is taken of."""
RETENTIONS = (1 / 9, 0.4)
"""The first one that a method can meet; those that show every token to some layers need the second."""


def build() -> Any:
    """LLaVA with a shallow CLIP tower (576 patches) and an LLM of 8 layers, hidden size 512, random weights."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
    )
    sizes = {**text_settings(LAYERS), "hidden_size": HIDDEN, "intermediate_size": 1376, "num_attention_heads": 8}
    text = LlamaConfig(**{**sizes, "num_key_value_heads": 8})
    torch.manual_seed(0)
    model: Any = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    )
    return model.eval()


def prompts(batch: int, padding: int) -> dict[str, Tensor]:
    """`batch` prompts of one image and TEXT tokens; row i has i * `padding` tokens of left padding."""
    visual = (SIDE // PATCH) ** 2
    ids = torch.randint(5, 110, (batch, TEXT + visual), generator=torch.Generator().manual_seed(0))
    ids[:, TEXT // 2 : TEXT // 2 + visual] = IMAGE
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : row * padding] = 0
    pixels = torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


@torch.inference_mode()
def measure(method: str, batch: int, padding: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of the three arms and of the host time inside the engine, their ratio, visual tokens kept.

    Raises VTCError where the method cannot run on this model.
    """
    model, inputs = build(), prompts(batch, padding)
    retention, kept = _first(model, method, inputs)
    mask, short = inputs["attention_mask"], torch.randn(batch, TEXT + kept, HIDDEN)
    inside: list[float] = []

    def full() -> None:
        model(**inputs)

    def native() -> None:
        model.model.get_image_features(inputs["pixel_values"])
        model(inputs_embeds=short, attention_mask=mask[:, : TEXT + kept])

    def compressed() -> None:
        with compress(model, method, retention=retention, trace=False) as handle:
            model(**inputs)
        inside.append(handle.stats.seconds)

    arms: dict[str, Callable[[], None]] = {"full": full, "compressed": compressed, "native": native}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + WARM):
        for name, arm in arms.items():
            if name == "full" and not WARM <= repeat < WARM + FULL:
                continue
            start = time.process_time()
            arm()
            if repeat >= WARM:
                times[name].append(time.process_time() - start)
    medians = {name: 1000 * statistics.median(values) for name, values in times.items()}
    ratio = statistics.median(one / other for one, other in zip(times["compressed"], times["native"], strict=True))
    return {**medians, "ratio": ratio, "engine": 1000 * statistics.median(inside), "kept": kept}


def _first(model: Any, method: str, inputs: dict[str, Tensor]) -> tuple[float, int]:
    """The first retention that a method can meet, and the visual tokens that then enter a layer, in the mean."""
    for retention in RETENTIONS:
        try:
            with compress(model, method, retention=retention, trace=False) as handle:
                model(**inputs)
        except BudgetError as error:
            refused = error
            continue
        return retention, round(handle.stats.visual_tokens_kept / len(inputs["input_ids"]))
    raise refused


def report(rows: Iterable[Sequence[str]], repeats: int) -> str:
    """The document around the rows."""
    about = f"""LLaMA-type stack, hidden {HIDDEN}, {LAYERS} layers, {TEXT} text and {(SIDE // PATCH) ** 2} visual
    tokens, CPU, one thread and its processor time, medians of {repeats} interleaved repetitions ({FULL} of the whole
    prompt), encoding, attach and detach included. The limit is the same model on a natively short sequence, as long as
    the compressed one in the mean over the layers, behind the same encoding; of methods on the KV cache, whose prompt
    stays whole, it is the whole prompt. Ratios are taken round by round. Methods that need more than the
    model, such as learned weights or a CLIP pair, are left out. The engine's own milliseconds are wall time of a
    shared machine."""
    head = "method", "visual tokens", "batch", "full ms", "compressed ms", "limit ms", "compressed / limit", "engine ms"
    title, packages = "Cost of a compressed prefill", ("torch", "transformers")
    return page(title, "python -m vtc.testing.overhead", about, (head, rows), packages=packages)


def main(repeats: int = 9) -> None:
    """Print the document; each line of its table goes to stderr as soon as it is measured."""
    torch.set_num_threads(1)
    rows = []
    known = [METHODS.get(name) for name in METHODS.names() if not METHODS.get(name).trained]
    for method in [one.name for one in known if one.from_options().needs_budget]:
        for batch, padding in ((1, 0), (4, 5)):
            try:
                row = measure(method, batch, padding, repeats)
            except VTCError as error:
                print(f"{method} is left out: {error}", file=sys.stderr, flush=True)
                break
            cells = [f"{row[arm]:.1f}" for arm in ("full", "compressed", "native")]
            rows.append(
                [method, f"{row['kept']:.0f}", str(batch), *cells, f"{row['ratio']:.2f}", f"{row['engine']:.2f}"]
            )
            print(*rows[-1], file=sys.stderr, flush=True)
    sys.stdout.write(report(rows, repeats))


if __name__ == "__main__":
    main()
