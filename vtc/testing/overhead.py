"""`python -m vtc.testing.overhead` compares a compressed prefill with the same model on a natively short sequence.

Three arms run interleaved in one process on one random LLaMA-sized stack: the whole prompt, the prompt compressed by a
method, and a prompt that was as short from the start (its embeddings fed directly, behind the same encoding of the
pictures). Where a method shortens the sequence between layers, the last of these is cut there, at no cost. The tower is
shallow, so that the figures are about the language model. Medians; the natively short prompt is the limit.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from vtc.app.catalogue import list_methods
from vtc.app.pages import Table, page
from vtc.engine.attach import compress
from vtc.errors import BudgetError, VTCError
from vtc.method.registry import METHODS, create
from vtc.testing.family import IMAGE, text_settings

SIDE, PATCH, TEXT = 336, 14, 40
HIDDEN, LAYERS = 512, 8
WARM, FULL = 2, 3
"""Rounds that warm up; rounds in which the whole prompt is measured too, which no ratio is taken of."""
GOALS = {True: 1.03, False: 1.05}
"""Compressed over limit that is aimed at: of methods that act before the LLM, their selection included, and of others
without it."""
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


@contextmanager
def cut(layers: Sequence[Any], rows: Sequence[int]) -> Iterator[None]:
    """Inside, LLM layer number l sees no more than the first `rows[l]` positions of what enters it.

    This is how long the sequence of a prefill is behind a method, without the method.
    """

    def shorten(count: int) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]:
        def hook(layer: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
            mask = given["attention_mask"]
            given["attention_mask"] = None if mask is None else mask[..., :count, :count]
            given["position_ids"] = given["position_ids"][:, :count]
            given["position_embeddings"] = tuple(part[:, :count] for part in given["position_embeddings"])
            return (args[0][:, :count], *args[1:]), given

        return hook

    with ExitStack() as hooks:
        for layer, count in zip(layers, rows, strict=True):
            if count < rows[0]:
                hooks.callback(layer.register_forward_pre_hook(shorten(count), with_kwargs=True).remove)
        yield


@torch.inference_mode()
def measure(method: str, batch: int, padding: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of the three arms and of the host time inside the engine, their ratio, visual tokens kept.

    Raises VTCError where the method cannot run on this model.
    """
    model, inputs = build(), prompts(batch, padding)
    retention, kept, rows = _first(model, method, inputs)
    mask, short = inputs["attention_mask"], torch.randn(batch, rows[0], HIDDEN)
    inside: list[float] = []

    def full() -> float:
        model(**inputs)
        return 0

    def native() -> float:
        model.model.get_image_features(inputs["pixel_values"])
        model(inputs_embeds=short, attention_mask=mask[:, : rows[0]])
        return 0

    def compressed() -> float:
        with compress(model, method, retention=retention, trace=False) as handle:
            model(**inputs)
        return handle.stats.seconds

    arms: dict[str, Callable[[], float]] = {"full": full, "compressed": compressed, "native": native}
    layers = {name: rows if name == "native" else [rows[0]] * LAYERS for name in arms}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + WARM):
        for name, arm in arms.items():
            if name == "full" and not WARM <= repeat < WARM + FULL:
                continue
            with cut(model.model.language_model.layers, layers[name]):
                start, begun = time.process_time(), time.perf_counter()
                engine = arm()
                seconds, waited = time.process_time() - start, time.perf_counter() - begun
            if repeat >= WARM:
                times[name].append(seconds)
                inside += [engine * seconds / waited] if engine else []  # its clock goes on while other processes run
    medians = {name: 1000 * statistics.median(values) for name, values in times.items()}
    ratio = statistics.median(one / other for one, other in zip(times["compressed"], times["native"], strict=True))
    return {**medians, "ratio": ratio, "engine": 1000 * statistics.median(inside), "kept": kept}


def _goal(before: bool, row: dict[str, float]) -> float:
    return GOALS[before] + (0 if before else row["engine"] / row["native"])


def _first(model: Any, method: str, inputs: dict[str, Tensor]) -> tuple[float | None, int, tuple[int, ...]]:
    """The first retention that a method can meet, the visual tokens of a layer then, in the mean, and all its rows.

    None for a method that takes none, which has to drop something as it is.
    """
    budgeted = create(method).needs_budget
    for retention in RETENTIONS if budgeted else (None,):
        try:
            with compress(model, method, retention=retention, trace=False) as handle:
                model(**inputs)
        except BudgetError as error:
            refused = error
            continue
        if not budgeted and handle.stats.retention == 1:
            raise VTCError(f"{method!r} drops nothing here")
        kept = round(handle.stats.visual_tokens_kept / len(inputs["input_ids"]))
        return retention, kept, handle.stats.calls[0].layer_rows
    raise refused


def report(rows: Sequence[Sequence[str]], repeats: int) -> str:
    """The document around the rows."""
    about = f"""LLaMA-type stack, hidden {HIDDEN}, {LAYERS} layers, {TEXT} text and {(SIDE // PATCH) ** 2} visual
    tokens, CPU, one thread and its processor time, medians of {repeats} interleaved repetitions ({FULL} of the whole
    prompt), encoding, attach and detach included. The limit is the same model on a natively short sequence, as long in
    every layer as the compressed one, behind the same encoding; of methods on the KV cache, whose prompt stays whole,
    it is the whole prompt. Ratios are taken round by round. Methods that take no budget run with their defaults, where
    these drop anything. The goal is {GOALS[True]} for methods that act before the
    LLM, and for others {GOALS[False]} and what the engine takes for their selection. Methods that need more than the
    model, such as learned weights or a CLIP pair, are left out."""
    times = "full ms", "compressed ms", "limit ms", "compressed / limit", "goal", "engine ms"
    head = "method", "visual tokens", "batch", *times
    title, packages = "Cost of a compressed prefill", ("torch", "transformers")
    return page(title, "python -m vtc.testing.overhead", about, (head, rows), _met(rows), packages=packages)


def _met(rows: Sequence[Sequence[str]]) -> Table:
    """Of each batch size the median ratio, and in how many rows the goal is met."""
    found = []
    for batch in sorted({row[2] for row in rows}):
        here = [(float(row[6]), float(row[7])) for row in rows if row[2] == batch]
        middle, met = statistics.median(ratio for ratio, _ in here), sum(ratio <= goal for ratio, goal in here)
        found.append([batch, f"{middle:.2f}", f"{met} of {len(here)}"])
    return ("batch", "compressed / limit in the median", "goal met by"), found


def main(repeats: int = 5) -> None:
    """Print the document; each line of its table goes to stderr as soon as it is measured."""
    torch.set_num_threads(1)
    rows = []
    later = {name for stage in ("llm", "cache") for name in list_methods(stage=stage, family="llava")}
    for method in [name for name in METHODS.names() if not METHODS.get(name).trained]:
        for batch, padding in ((1, 0), (4, 5)):
            try:
                row = measure(method, batch, padding, repeats)
            except VTCError as error:
                print(f"{method} is left out: {error}", file=sys.stderr, flush=True)
                break
            cells = [f"{row[arm]:.1f}" for arm in ("full", "compressed", "native")]
            shares = [f"{row['ratio']:.2f}", f"{_goal(method not in later, row):.2f}", f"{row['engine']:.2f}"]
            rows.append([method, f"{row['kept']:.0f}", str(batch), *cells, *shares])
            print(*rows[-1], file=sys.stderr, flush=True)
    sys.stdout.write(report(rows, repeats))


if __name__ == "__main__":
    main()
