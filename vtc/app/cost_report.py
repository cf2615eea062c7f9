"""What `vtc cost` prints: one prompt on one model under all conventions, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vtc import adapters, embedded
from vtc.cost.conventions import CONVENTIONS, convention
from vtc.cost.exact import Cost, Work, cost, decoding, operators
from vtc.cost.published import PUBLISHED
from vtc.cost.reference import rows
from vtc.cost.roofline import Hardware, seconds, viewer_operators
from vtc.cost.shapes import ModelShape
from vtc.cost.token_counts import TokenCounts, constant, parse
from vtc.errors import BudgetError, InputError, one_line, shown, unknown_name
from vtc.method.budget import Budget

EXACT = "exact"


def load_shape(name: str) -> ModelShape:
    """The sizes of a published model, an embedded one, a folder, a config.json, or a hub name with a slash.

    Raises InputError for what cannot be read, UnknownName for other names and UnsupportedModel for other classes.
    """
    if name in PUBLISHED:
        return PUBLISHED[name]
    path = str(embedded.model_path(name)) if name in embedded.NAMES else name
    if not Path(path).exists() and "/" not in path:
        raise unknown_name("model shape", name, [*PUBLISHED, *embedded.NAMES])
    from transformers import AutoConfig  # the published shapes do without it

    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:
        raise InputError(
            f"no configuration can be read from {name!r} ({one_line(error)[:160]}); give a folder with a config.json, "
            f"the file itself, or one of {', '.join(PUBLISHED)}"
        ) from error
    return adapters.shape_of(config).called(Path(name).name if Path(name).is_dir() else name)


@dataclass(frozen=True)
class Prompt:
    """What is asked. visual, text: tokens; crops: of the pictures, where the tokens do not tell. element: bytes of a
    number. entering: the visual tokens of each layer.
    """

    visual: int
    text: int
    entering: TokenCounts
    crops: int | None = None
    new_tokens: int = 1
    batch: int = 1
    element: int = 2

    def __post_init__(self) -> None:
        for name, least in (("visual", 0), ("text", 0), ("new_tokens", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name.replace('_', '-')}={getattr(self, name)} is too small; write {least} or more")
        if not self.visual + self.text:
            raise InputError("the prompt has no tokens; write --text or --visual")
        if self.crops is not None and self.crops < 1:
            raise InputError(f"crops={self.crops} is too small; write 1 or more, or leave it out")
        if self.element not in (1, 2, 4):
            raise InputError(f"bytes={self.element} is no size of a number; write 1, 2 or 4")

    def work(self, shape: ModelShape, entering: TokenCounts) -> Work:
        """The prompt as work with so many visual tokens in each layer."""
        encoded = shape.encoded(self.visual, self.crops)
        return Work(entering, self.text, encoded, new_tokens=self.new_tokens)


def token_counts_of(
    layers: int, visual: int, *, retention: float | None = None, keep: int | None = None, steps: str | None = None
) -> TokenCounts:
    """The visual tokens of each layer from one of a retention, a number of tokens, or steps such as ``2:128``.

    Raises BudgetError or InputError for values outside their range, and for more than one of them.
    """
    given = [value for value in (retention, keep, steps) if value is not None]
    if len(given) > 1:
        raise BudgetError("several of retention, keep and layers given; write one of them")
    if steps is not None:
        return parse(steps, layers, visual)
    return constant(layers, Budget(retention, keep).tokens(visual) if given else visual)


def cost_report(shape: ModelShape, prompt: Prompt, hardware: Hardware) -> dict[str, Any]:
    """The cost of a prompt, beside that of the same prompt with all its visual tokens in every layer.

    Numbers are of the whole batch. What is no count but an estimate is called so.
    """
    full = constant(shape.llm.layers, prompt.visual)
    ours, plain = (cost(shape, prompt.work(shape, each), prompt.element) for each in (prompt.entering, full))
    times = [_seconds(shape, prompt, each, hardware) for each in (prompt.entering, full)]
    return {
        "model": shape.name,
        "source": shape.source,
        "visual": prompt.visual,
        "text": prompt.text,
        "new_tokens": prompt.new_tokens,
        "batch": prompt.batch,
        "layers": [list(span) for span in prompt.entering.spans],
        "mean_visual": prompt.entering.mean,
        "conventions": list(_conventions(shape, prompt, full, ours, plain)),
        "exact": _scaled(ours, prompt.batch),
        "exact_untouched": _scaled(plain, prompt.batch),
        "hardware": asdict(hardware),
        "estimate_seconds": times[0],
        "estimate_seconds_untouched": times[1],
    }


def _conventions(
    shape: ModelShape, prompt: Prompt, full: TokenCounts, ours: Cost, plain: Cost
) -> Iterator[dict[str, Any]]:
    for each in CONVENTIONS.values():
        here, there = (each.operations(shape.llm, spans, prompt.text) for spans in (prompt.entering, full))
        yield _entry(
            each.name, each.unit, each.formula, each.users, each.text, prompt.batch * here, prompt.batch * there
        )
    what = "tower, projector, grouped-query attention and logits"
    yield _entry(EXACT, "operations", what, "vtc", None, prompt.batch * ours.prefill, prompt.batch * plain.prefill)


def _entry(
    name: str, unit: str, formula: str, users: str, text: int | None, flops: float, untouched: float
) -> dict[str, Any]:
    share = flops / untouched if untouched else 1.0
    return {
        "name": name, "unit": unit, "formula": formula, "users": users, "text": text, "flops": flops,
        "untouched": untouched, "share": share,
    }  # fmt: skip


def _scaled(one: Cost, batch: int) -> dict[str, float]:
    """The parts of a cost for a batch; weights are there once."""
    parts = {name: (1 if name == "weight_bytes" else batch) * value for name, value in vars(one).items()}
    names = {"activation_bytes": "estimate_activation_bytes", "weight_bytes": "estimate_weight_bytes"}
    parts = {names.get(name, name): value for name, value in parts.items() if name != "method"}
    return {**parts, "prefill": batch * one.prefill, "total": batch * one.total}


def _seconds(shape: ModelShape, prompt: Prompt, entering: TokenCounts, hardware: Hardware) -> dict[str, float | None]:
    work = prompt.work(shape, entering)
    viewer = viewer_operators(shape.llm, entering.plus(prompt.text), prompt.element)
    return {
        "prefill": seconds(operators(shape, work, prompt.element, prompt.batch), hardware),
        "decode": seconds(decoding(shape, work, prompt.element, prompt.batch), hardware),
        "prefill_llmviewer": seconds(viewer, hardware) if prompt.batch == 1 else None,
    }


def translated(shape: ModelShape, text: int, written: str) -> dict[str, Any]:
    """A published number, such as ``ffn3_visual=3.82T``, in all conventions.

    It is read as a prompt with the same visual tokens in every layer, which are found by halving; `text` counts where
    the convention counts the prompt's. Raises InputError for what is no number, or one that no prompt has.
    """
    name, _, value = written.partition("=")
    units = {"T": 1e12, "G": 1e9, "M": 1e6}
    value = value.strip()
    try:
        wanted = float(value.rstrip("TGM")) * units.get(value[-1:], 1.0)
    except ValueError:
        wanted = 0.0
    if not 0 < wanted < float("inf"):
        raise InputError(f"{shown(written)} is no published number; write a convention and a value: ffn3_visual=3.82T")
    layers = shape.llm.layers

    def count(tokens: float) -> float:
        if name.strip() != EXACT:
            return convention(name.strip()).operations(shape.llm, constant(layers, tokens), text)
        return cost(shape, Work(constant(layers, tokens), text, shape.encoded(round(tokens)))).prefill

    tokens = _solve(count, wanted, written)
    full = constant(layers, tokens)
    prompt = Prompt(round(tokens), text, full)
    plain = cost(shape, Work(full, text, shape.encoded(round(tokens))))
    found = list(_conventions(shape, prompt, full, plain, plain))
    return {"model": shape.name, "text": text, "given": written, "visual": tokens, "conventions": found}


def _solve(count: Callable[[float], float], wanted: float, written: str) -> float:
    low, high = 0.0, 2.0**24
    if not count(low) <= wanted <= count(high):
        raise InputError(f"{written!r}: on this model no prompt has it; its text alone comes to {count(low):.4g}")
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if count(middle) <= wanted else (low, middle)
    return (low + high) / 2


def check_report() -> list[dict[str, Any]]:
    """All published numbers beside ours."""
    return [{**asdict(row), "agrees": row.agrees} for row in rows()]
