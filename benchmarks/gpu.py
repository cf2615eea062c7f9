"""The steps of `gpu.sh`: `gpu.py selections|waits FILE [--tiny]`, `gpu.py bench FOLDER SHAPE [--tiny]`, `draw FOLDER`.

`draw` needs `pip install ".[eval]"` and no GPU: a plain PyTorch image measures, another machine draws.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vtc
from vtc.app.pages import page
from vtc.eval.bench.clock import Clock
from vtc.eval.bench.record import read_record
from vtc.eval.bench.run import bench
from vtc.eval.bench.spec import BenchSpec, Load
from vtc.method.base import CacheStage, StageView
from vtc.method.items import ItemTable
from vtc.method.layout import VisualItem
from vtc.method.states import States
from vtc.testing import tiny_inputs, tiny_model
from vtc.testing.everything import runs
from vtc.testing.released import SHAPES, SelectionCase, fresh
from vtc.testing.released.cases import selection_cases
from vtc.testing.views import Entries, Shape

COMMAND = "bash benchmarks/gpu.sh OUT"
BATCH, REPEATS = 8, 15
LLAVA = ("vtc_cls", "divprune", "fastv@0.5"), tuple(keep / 576 for keep in (192, 128, 64)), Load(1, 336, 336), (1, 8)
QWEN = ("random", "divprune", "fastv(layer=2)@0.5"), (1496 / 1995, 998 / 1995)
RUNS: dict[str, tuple[tuple[str, ...], tuple[float, ...], Load, tuple[int, ...]]] = {
    "llava-1.5-7b": LLAVA,
    "qwen2.5-vl-7b": (*QWEN, Load(1, 57 * 28, 35 * 28), (1,)),
    "qwen3-vl-4b": (*QWEN, Load(1, 57 * 32, 35 * 32), (1, 4)),
}
"""Methods, retentions, pictures and batch sizes: of 576 tokens, and of 57 x 35 = 1995 that are 28 or 32 pixels wide."""
FAMILIES = "llava-clip", "llava-next", "llava-onevision", "qwen2.5-vl", "qwen3-vl", "internvl"
METHODS = "random", "hiprune", "divprune", "fastv", "visionzip", "vqtoken_codebook"
PROMPTS: list[list[Any]] = [[4, "image", 3], [2, "image", 12]]


# --- selections
def moved(value: Any, device: torch.device) -> Any:
    """The same value with all tensors in it on the device."""
    if isinstance(value, Tensor | torch.nn.Module):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(entry, device) for key, entry in value.items()}
    if type(value) is tuple:
        return tuple(moved(entry, device) for entry in value)
    if isinstance(value, States):
        return States(value.all().to(device))
    if isinstance(value, StageView | ItemTable | VisualItem | Entries):
        return type(value)(**{f.name: moved(getattr(value, f.name), device) for f in dataclasses.fields(value)})
    return value


def seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median seconds of a call on the device, by its events."""
    clock = Clock(device)
    call()
    spans = []
    for _ in range(repeats):
        clock.settle()
        start = clock.mark()
        call()
        spans.append((start, clock.mark()))
    clock.settle()
    return statistics.median(clock.seconds(*span) for span in spans)


def waited(call: Callable[[], Any], device: torch.device) -> list[str] | None:
    """The lines of Python at which the host waits for the GPU during a call; None without a GPU."""
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = [f"{each.filename}:{each.lineno}" for each in seen if "a synchronizing" in str(each.message)]
    return [place.partition("/.path/")[2] or "/".join(place.split("/")[-2:]) for place in places]


def count(places: list[str] | None) -> str:
    return "-" if places is None else str(len(places))


def bandwidth(device: torch.device, size: int) -> float:
    """Bytes per second that a copy of `size` bytes reads and writes."""
    source = torch.zeros(size // 4, device=device)
    return 2 * size / seconds(lambda: source.clone(), device, 9)


def selection(case: SelectionCase, shape: Shape, device: torch.device, repeats: int, speed: float) -> list[str]:
    """A line of the table."""
    method, view = case.seen(shape, BATCH)
    view = moved(view, device)
    read = [*(view.tokens,) * case.wide, *view.vision_rows.values(), *view.llm_rows.values()]
    if isinstance(view.stage, CacheStage):  # readings of one layer, and its entries
        rows = [rows for (layer, _), rows in view.llm_rows.items() if layer == view.stage.from_layer]
        read = [*(view.entries if case.wide else ()), *rows]
    bytes_ = sum(value.numel() * value.element_size() for value in read)

    def call() -> Any:
        return method.select(fresh(view))

    with torch.no_grad():
        taken, waits = seconds(call, device, repeats), count(waited(call, device))
    floor = bytes_ / speed
    cells = f"{1e3 * taken:.3f}", f"{bytes_ / 1e6:.2f}", f"{1e3 * floor:.4f}", f"{taken / floor:.0f}" if floor else "-"
    return [case.name, str(view.items.mask.shape[1]), *cells, waits]


def selections(file: Path, *, tiny: bool) -> None:
    """Write the page."""
    device = torch.device("cpu" if tiny else "cuda")
    name = "CPU" if tiny else torch.cuda.get_device_name()
    speed = bandwidth(device, 2**22 if tiny else 2**30)
    shapes = {36: Shape(((1, 6, 6),))} if tiny else SHAPES
    rows, left_out = [], []
    for case in selection_cases().values():
        options = {**case.options, **({"retain": 16} if tiny and "retain" in case.options else {})}
        case = dataclasses.replace(case, options=options, keep=8 if tiny and case.keep else case.keep)
        for tokens, shape in shapes.items():
            if not case.fits(shape):
                continue
            try:
                rows.append(selection(case, shape, device, 1 if tiny else REPEATS, speed))
            except Exception as error:
                left_out.append(f"{case.name} at {tokens} tokens: {type(error).__name__}: {error}")
    about = f"""{name}, batch {BATCH}, medians of device events. "bytes" are the tokens and readings that a selection
    has to read once, "floor" the time they take at the {speed / 1e9:.0f} GB/s that a copy reaches here, "waits" how
    often the host waited for the device (its debug mode for synchronisation)."""
    head = "selection", "tokens", "ms", "bytes, MB", "floor, ms", "ms / floor", "waits"
    parts = ["Failed:\n\n" + "\n".join(f"- {line}" for line in left_out)] if left_out else []
    command = COMMAND + (" --tiny" if tiny else "")
    file.write_text(page("Selections on a device", command, about, (head, rows), *parts, packages=("torch",)))
    if left_out:
        raise SystemExit(f"{len(left_out)} selections failed, see {file.name}")


# --- waits
def waits(file: Path, *, tiny: bool) -> None:
    """Write where the host waits in a whole prefill of small models."""
    device = torch.device("cpu" if tiny else "cuda")
    rows = []
    for name in FAMILIES[:1] if tiny else FAMILIES:
        model = tiny_model(name).eval()
        inputs = {key: value.to(device) for key, value in tiny_inputs(name, PROMPTS, model=model).items()}
        model.to(device)

        def call(model: Any = model, inputs: Any = inputs) -> Any:
            with torch.no_grad():
                return model(**inputs, use_cache=True)

        call()
        before = count(waited(call, device))
        for text in METHODS:
            method = vtc.create(text)
            if not runs(method, vtc.adapters.of(model).spec):
                continue
            with vtc.compress(model, method, retention=0.7):
                call()
                places = Counter(waited(call, device) or ())
            ours = [f"{place} ({times})" for place, times in places.items() if place.startswith("vtc/")]
            total = "-" if tiny else str(places.total())
            rows.append([name, text, before, total, ", ".join(ours) or "-"])
    about = """how often the host waits for the GPU (its debug mode for synchronisation) while a small model with
    random weights reads two prompts with images: untouched, and with a method attached, of which in this library."""
    head = "model", "method", "untouched", "attached", "waits of vtc"
    command = COMMAND + (" --tiny" if tiny else "")
    file.write_text(page("Where the host waits", command, about, (head, rows), packages=("torch", "transformers")))


# --- requests
def requests(folder: Path, shape: str, *, tiny: bool) -> None:
    """Prefill and decoding of a shape, recorded as `vtc bench` records them."""
    methods, retentions, load, batches = RUNS[shape]
    settings: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16", "new_tokens": 8, "repeats": 5}
    if tiny:
        shape, load, methods, retentions, batches = "small-llava", Load(1, 56, 56), ("random",), retentions[:1], (1,)
        settings = {"device": "cpu", "new_tokens": 2, "repeats": 1, "warmup": 0, "layers": 1}
    spec = BenchSpec(shape, methods, retentions, batches, load=load, loads=(), **settings)
    bench(spec, folder)


def draw(folder: Path) -> None:
    """The pages of what was recorded."""
    from vtc.eval.bench.page import write_bench

    write_bench(read_record(folder), folder, COMMAND)


def main(words: list[str]) -> None:
    """Run one step."""
    begun, tiny = time.perf_counter(), "--tiny" in words
    what, out, *more = [word for word in words if word != "--tiny"]
    if what == "draw":
        return draw(Path(out))
    if not tiny and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here; --tiny takes the same steps on the CPU")
    if what in ("selections", "waits"):
        {"selections": selections, "waits": waits}[what](Path(out), tiny=tiny)
    else:
        requests(Path(out), *more, tiny=tiny)
    print(f"{what} {' '.join(more)}: {time.perf_counter() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
