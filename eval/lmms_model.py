"""The model that lmms-eval's own command line runs::

    python -m lmms_eval --model vtc --model_args pretrained=tiny-llava,method=vtc_cls,retention=0.25 --tasks ...

One process answers one cell; `vtc sweep` compares many and resumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.utils import Collator

from vtc.app import loading
from vtc.app.answer import Answer
from vtc.app.images import pillow_defaults
from vtc.app.media import Sampling
from vtc.app.preparation import Chat, alike
from vtc.app.video_reading import VideoReading
from vtc.errors import InputError, one_line
from vtc.eval.cells import BASELINE, make_cell
from vtc.eval.generation import Generation, make_generation
from vtc.eval.messages import Clips, conversation
from vtc.eval.runner import Runner, batch_seed
from vtc.method.base import Compressor, Positions
from vtc.method.budget import Budget
from vtc.method.text import attachable, read

AUTO = 8
"""Prompts per batch where lmms-eval is told `--batch_size auto`."""


class VTC(lmms):  # type: ignore[misc]
    """A model under one compression method at one retention, for lmms-eval.

    `pretrained` is what `vtc.app.loading.load` takes. `method` is ``none`` for the untouched model, else a method as a
    sweep takes it as text; one that takes a budget needs `retention` or `keep`. Further arguments are hyper-parameters
    of the method; one that it does not have is refused. `batch_size` may be ``auto``, which is `max_batch_size` or 8,
    whichever is smaller: memory is not probed. `frames`, `fps`, `sampling` and `max_pixels` are those of
    `vtc.app.video_reading.VideoReading`. `answers` holds token counts by task and document, which lmms-eval has
    no place for.

    Raises:
        VTCError: an unknown method, hyper-parameter or model, a budget that is missing or makes no sense.
    """

    is_simple = False
    accelerator = None  # else lmms-eval builds one

    def __init__(
        self,
        pretrained: str = "tiny-llava",
        method: str = BASELINE,
        retention: float | str | None = None,
        keep: int | str | None = None,
        positions: Positions | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        revision: str | None = None,
        seed: int | str = 0,
        max_batch_size: int | str | None = None,
        frames: int | str | None = None,
        fps: float | str | None = None,
        sampling: Sampling | None = None,
        max_pixels: int | str | None = None,
        **hyper_parameters: Any,
    ) -> None:
        super().__init__()
        self.batch_size = _batch_size(batch_size, max_batch_size)
        number = _number("seed", seed, int)
        self.reading = VideoReading(
            _number("frames", frames, int), _number("fps", fps, float), sampling, _number("max_pixels", max_pixels, int)
        )
        limits: dict[str, Any] = {
            "retention": _number("retention", retention, float),
            "keep": _number("keep", keep, int),
        }
        compressor: Compressor | None = None
        if method == BASELINE:
            given = [*hyper_parameters, *(name for name, limit in limits.items() if limit not in (None, 1))]
            if given:
                raise InputError(f"unknown model_args: {', '.join(given)}; they need a method, such as method=vtc_cls")
        else:
            options = {name: read(method, name, v) if isinstance(v, str) else v for name, v in hyper_parameters.items()}
            compressor, limits = attachable(method, options, seed=number, **limits)
        loaded = loading.load(
            pretrained,
            device=device or "auto",
            dtype=dtype,
            attn_implementation=attn_implementation,
            revision=revision,
        )
        self.runner = Runner(loaded)
        common: dict[str, Any] = {"seed": number, "generation": {}, "model": loaded.fingerprint()}
        common["video"] = self.reading.settings()
        budget = None if limits["retention"] is None and limits["keep"] is None else Budget(**limits)
        cell = make_cell(method, compressor, budget, positions, **common)
        self.cell = self.runner.check(cell)
        self.device = loaded.model.device
        self.answers: dict[tuple[str, int], Answer] = {}

    def clean(self) -> None:
        """Keep the weights: lmms-eval calls this after generation, and the same instance may be asked again."""

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Answer chat requests in batches of equal generation settings."""
        collator = Collator(
            [request.args for request in requests],
            lambda args: (-len(args[0]), args[3]),
            group_fn=lambda args: args[2],
            grouping=True,
        )
        results, answered = [], []
        for chunk in collator.get_batched(n=self.batch_size):
            _, _, settings, first, task, _ = chunk[0]
            generation = make_generation(settings, source=f"task {task!r}")
            clips = Clips(self.reading)
            prompts = [self._read(to_messages, name, split, i, clips) for _, to_messages, _, i, name, split in chunk]
            answers = self._answered(prompts, generation, batch_seed(self.cell.seed, task, first))
            for (_, _, _, doc_id, name, _), answer in zip(chunk, answers, strict=True):
                self.answers[name, doc_id] = answer
                answered.append(answer)
                results.append(GenerationResult(answer.text, TokenCounts(answer.input_tokens, answer.output_tokens)))
        _log(answered)
        ordered: list[GenerationResult] = collator.get_original(results)
        return ordered

    def _answered(self, prompts: Sequence[Chat], generation: Generation, seed: int) -> list[Answer]:
        """The answers to `prompts` in their order; those that cannot stand in one batch are asked in several."""
        found: dict[int, Answer] = {}
        for places in alike(prompts):
            batch = self.runner.prepare([prompts[place] for place in places])
            found |= zip(places, self.runner.answer(batch, self.cell, generation, seed=seed), strict=True)
        return [found[place] for place in range(len(prompts))]

    def _read(self, to_messages: Any, task: str, split: str, doc_id: int, clips: Clips) -> Chat:
        """The chat messages of one document; InputError that names it if the task's code or its pictures fail."""
        source = f"task {task!r}, document {doc_id}"
        with pillow_defaults():
            try:
                messages = to_messages(self.task_dict[task][split][doc_id])
            except Exception as error:
                raise InputError(f"{source} cannot be read: {one_line(error)}") from error
            return conversation(messages, source, clips)

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Not offered."""
        raise NotImplementedError("vtc answers generate_until tasks")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        """Not offered."""
        raise NotImplementedError("vtc answers generate_until tasks")


def _batch_size(given: int | str, most: int | str | None) -> int:
    """Prompts per batch; of ``auto`` and ``auto:N`` the smaller of AUTO and `most`."""
    if str(given).partition(":")[0] == "auto":
        return min(AUTO, _batch_size(most, None)) if most else AUTO
    number: int | None = _number("batch_size", given, int)
    if number is None or number < 1:
        raise InputError(f"batch_size={given!r} is no number of prompts; write 8, for example, or auto")
    return number


def _number(name: str, given: Any, kind: type) -> Any:
    """A number that lmms-eval hands on as text; None stays."""
    try:
        return given if given is None else kind(given)
    except (TypeError, ValueError) as error:
        example = {"retention": "0.25", "keep": "64", "seed": "0", "fps": "1"}.get(name, "8")
        raise InputError(f"{name}={given!r} is no number; write for example {name}={example}") from error


def _log(answers: Sequence[Answer]) -> None:
    """Hand lmms-eval the totals that it reports under "throughput"."""
    seconds = sum(answer.seconds for answer in answers)
    tokens = sum(answer.output_tokens for answer in answers)
    n = max(1, len(answers))
    log_metrics(
        total_elapsed_time=seconds,
        total_gen_tokens=tokens,
        avg_speed=tokens / seconds if seconds else 0.0,
        additional_metrics={
            "visual_tokens_in": sum(answer.visual_tokens_in for answer in answers) / n,
            "visual_tokens_kept": sum(answer.visual_tokens_kept for answer in answers) / n,
        },
    )
