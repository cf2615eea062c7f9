"""A scene: so many requests at once with so many pictures each, that every arm answers in turn."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import io
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vtc import adapters
from vtc.adapters.placement import device_of
from vtc.app.answer import Answerer
from vtc.app.images import open_image
from vtc.app.preparation import Chat, on_device, prepare
from vtc.engine.handle import Handle
from vtc.engine.installed import MethodWrapper
from vtc.eval.bench.arms import UNTOUCHED, Arm, limit
from vtc.eval.bench.clock import Clock, Memory
from vtc.eval.bench.models import Subject
from vtc.eval.bench.parts import Seams
from vtc.eval.bench.spec import Load
from vtc.eval.downsample import Downsampler

Values = dict[str, float | None]
Pictures = list[list[Image.Image]]


@dataclass(frozen=True)
class Facts:
    """What is known of an arm without a clock.

    visual: visual tokens of a prompt that enter an LLM layer, mean over layers and prompts. kv_bytes: keys and values
    that the cache really holds behind the prefill, counted_kv_bytes: the same as `vtc.cost` counts them, None where the
    family tells no sizes. limit: the arm that is as short from the start.
    """

    kind: str
    method: str
    retention: float | None
    keep: int | None
    visual: float
    kv_bytes: int
    counted_kv_bytes: float | None
    limit: str | None = None


class Scene:
    """Requests that differ in their pictures and are answered together, with `new_tokens` each."""

    def __init__(self, subject: Subject, load: Load, batch: int, new_tokens: int, prompt: str) -> None:
        self.load, self.batch, self.new_tokens, self.prompt = load, batch, new_tokens, prompt
        self.loaded = subject.loaded
        self.model = subject.loaded.model
        self.adapter = adapters.of(self.model)
        self.answerer = Answerer(self.loaded)
        self.downsampler = Downsampler(self.loaded)
        device = device_of(self.model)
        self.clock, self.memory = Clock(device), Memory(device)
        self.files = [[_file(load, row, number) for number in range(load.pictures)] for row in range(batch)]
        whole = self.answerer.prepare(self._chats(self._opened()))
        self.visual = fmean(whole.visual_tokens)
        self.text = int(whole.inputs["attention_mask"][0].sum()) - whole.visual_tokens[0]
        self._whole = whole
        self._encoder: list[tuple[str, dict[str, Any]]] = []
        self._embeddings: dict[int, Tensor] = {}

    @property
    def key(self) -> str:
        """What tells it from other scenes of a bench."""
        return f"{self.load} pictures, batch {self.batch}, {self.new_tokens} new"

    # --- what an arm is
    @torch.inference_mode()
    def admit(self, arm: Arm) -> Facts:
        """Run the arm's prefill once. The untouched model comes first: limits encode as it does.

        Raises:
            VTCError: this model cannot run it, or not at this budget, or the device has no room.
        """
        chats = self._chats(self._opened(), arm)
        if arm.kind == "downsample":
            assert arm.budget is not None
            self.downsampler.check(self._chats(self._opened())[0], arm.budget)
        batch = self.answerer.prepare(chats)
        watch = self._watched() if arm.kind == UNTOUCHED else contextlib.nullcontext()
        with self._attached(arm) as handle, watch:
            inputs = {"inputs_embeds": self._short(arm.tokens)} if arm.tokens is not None else batch.inputs
            output = on_device(self.model, lambda: self.model(**inputs, use_cache=True, logits_to_keep=1))
            visual = fmean(batch.visual_tokens) if arm.tokens is None else arm.tokens
            counted = self.answerer.spent(batch, handle)
            if handle is not None:
                visual = fmean(handle.stats.calls[-1].visual_tokens_kept)
        bytes_ = sum(entry["kv_bytes"] for entry in counted) if all(counted) and arm.tokens is None else None
        budget = {"retention": None, "keep": None} if arm.budget is None else vars(arm.budget)
        ends = limit(round(visual)).name if arm.kind == "method" else None
        return Facts(arm.kind, arm.method, **budget, visual=round(visual, 4), kv_bytes=held(output.past_key_values),
                     counted_kv_bytes=bytes_, limit=ends)  # fmt: skip

    # --- one measured run
    @torch.inference_mode()
    def request(self, arm: Arm, new_tokens: int | None = None) -> Values:
        """Answer once, from the bytes of files to the last token: seconds of each part, see `vtc.eval.bench.parts`.

        Further `per_token` seconds of one decoded token, `attach` and `engine` seconds of the host that attaching and
        the engine's hooks took (the latter lie inside the parts), `peak_bytes` and `rest_bytes` of memory.
        """
        clock, count = self.clock, self.new_tokens if new_tokens is None else new_tokens
        clock.settle()
        begun = time.perf_counter()
        with self._attached(arm) as handle:
            attach = time.perf_counter() - begun
            seams = Seams(self.adapter, clock, handle)
            rest = self.memory.start()
            try:
                start = clock.mark()
                pictures = self._opened()
                shown = clock.mark()
                inputs, _ = prepare(self.loaded, self._chats(pictures, arm))
                ready = clock.mark()
                if arm.tokens is not None:
                    inputs = self._encoded(inputs, arm.tokens)
                self.model.generate(
                    **inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False,
                    stopping_criteria=[seams.token],
                )  # fmt: skip
                end = clock.mark()
                clock.settle()
            finally:
                seams.remove()
            engine = None if handle is None else handle.stats.calls[-1].seconds
        peak = None if rest is None else self.memory.peak()
        inside = seams.seconds("selection")
        values: Values = {
            "picture": clock.seconds(start, shown),
            "processor": clock.seconds(shown, ready),
            "vision": seams.seconds("vision"),
            "selection": None if handle is None else inside,
            "prefill": seams.seconds("passes") - inside,
            "decode": clock.seconds(seams.tokens[0], seams.tokens[-1]) if count > 1 else None,
        }
        total = clock.seconds(start, end)
        return {
            **values,
            "other": total - sum(value for value in values.values() if value is not None),
            "total": total,
            "first_token": clock.seconds(start, seams.tokens[0]),
            "per_token": None if values["decode"] is None else values["decode"] / (count - 1),
            "attach": None if handle is None else attach,
            "engine": engine,
            "peak_bytes": peak,
            "rest_bytes": rest,
        }

    # --- what goes in
    def _opened(self) -> Pictures:
        return [[open_image(data) for data in row] for row in self.files]

    def _chats(self, pictures: Pictures, arm: Arm | None = None) -> list[Chat]:
        chats = []
        for number, row in enumerate(pictures, 1):
            content = [*({"type": "image", "image": each} for each in row), {"type": "text", "text": self.prompt}]
            chat = Chat([{"role": "user", "content": content}], f"request {number}")
            if arm is not None and arm.kind == "downsample":
                assert arm.budget is not None
                chat = self.downsampler.smaller(chat, arm.budget)
            chats.append(chat)
        return chats

    @contextlib.contextmanager
    def _attached(self, arm: Arm) -> Iterator[Handle | None]:
        if arm.compressor is None:
            yield None
            return
        with self.answerer.compressed(arm.compressor, **arm.limits) as handle:
            self._whole.tell(handle)
            yield handle

    # --- the limit
    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Take down how the model calls its encoder."""
        self._encoder = []
        wrappers = []
        for kind in self.adapter.modalities:
            name = f"get_{kind}_features"
            if (function := getattr(self.adapter.backbone, name, None)) is not None:
                wrappers.append(MethodWrapper(self.adapter.backbone, name, self._noting(name, function)))
        try:
            yield
        finally:
            for wrapper in wrappers:
                wrapper.remove()

    def _noting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function, updated=())
        def noted(*args: Any, **kwargs: Any) -> Any:
            given = dict(inspect.signature(function).bind_partial(*args, **kwargs).arguments)
            self._encoder.append((name, {**given.pop("kwargs", {}), **given}))
            return function(*args, **kwargs)

        return noted

    def _encoded(self, inputs: Mapping[str, Any], tokens: int) -> dict[str, Tensor]:
        """Encode the pictures as the untouched model does, and go on with embeddings that are short."""
        for name, given in self._encoder:
            own = {key: inputs[key] for key in given if key in inputs}
            getattr(self.adapter.backbone, name)(**{**given, **own})
        short = self._short(tokens)
        return {"inputs_embeds": short, "attention_mask": torch.ones_like(short[..., 0], dtype=torch.long)}

    def _short(self, tokens: int) -> Tensor:
        """[B, text + tokens, D] embeddings of a prompt that never was longer, of the size that real ones have."""
        if tokens not in self._embeddings:
            table = self.model.get_input_embeddings().weight
            draw = torch.Generator().manual_seed(tokens)
            noise = torch.randn(self.batch, self.text + tokens, table.shape[1], generator=draw)
            self._embeddings[tokens] = noise.to(table) * table.std()
        return self._embeddings[tokens]


def held(cache: Any) -> int:
    """Bytes of memory under the keys and values of a cache, each storage once."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def facts(record: Mapping[str, Any]) -> Facts:
    """The facts that a record holds."""
    return Facts(**{field.name: record[field.name] for field in dataclasses.fields(Facts)})


def _file(load: Load, row: int, number: int) -> bytes:
    """A JPEG of coarse and fine structure, so that it decodes like a photograph."""
    draw = np.random.default_rng([row, number])
    coarse = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((load.width, load.height), Image.Resampling.BICUBIC)
    fine = draw.normal(0, 12, (load.height, load.width, 1))
    values = np.clip(np.asarray(picture) + fine, 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "JPEG", quality=90)
    return stream.getvalue()
