"""The model that lmms-eval's own command line runs::

    python -m lmms_eval --model vtc --model_args pretrained=tiny-llava,method=vtc_cls,retention=0.25 --tasks ...

One process answers one cell; `vtc sweep` compares many and resumes. Multiple-choice tasks, which ask how likely each
choice is, need lmms-eval's option ``--force_simple`` (`vtc.eval.lmms_simple`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.utils import Collator

from vtc.adapters.placement import device_of
from vtc.app import loading
from vtc.app.answer import Answer
from vtc.app.images import pillow_defaults
from vtc.app.media import Sampling
from vtc.app.preparation import Chat, alike
from vtc.app.video_reading import VideoReading
from vtc.errors import InputError, one_line
from vtc.eval.cells import BASELINE, make_cell
from vtc.eval.generation import Generation, make_generation
from vtc.eval.lmms_arguments import batch_size_of, check_known, number_of
from vtc.eval.messages import Clips, conversation
from vtc.eval.runner import Runner, batch_seed
from vtc.method.base import Compressor, Positions
from vtc.method.budget import Budget
from vtc.method.text import attachable, read


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
        self.batch_size = batch_size_of(batch_size, max_batch_size)
        number = number_of("seed", seed, int)
        self.reading = VideoReading(
            number_of("frames", frames, int),
            number_of("fps", fps, float),
            sampling,
            number_of("max_pixels", max_pixels, int),
        )
        limits: dict[str, Any] = {
            "retention": number_of("retention", retention, float),
            "keep": number_of("keep", keep, int),
        }
        compressor: Compressor | None = None
        check_known(hyper_parameters, method, list(inspect.signature(VTC).parameters)[:-1])
        if method == BASELINE:
            asked = [name for name, limit in limits.items() if limit not in (None, 1)]
            if asked:
                raise InputError(f"model_args {', '.join(asked)} need a method, such as method=vtc_cls")
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
        self.device = device_of(loaded.model)
        self.answers: dict[tuple[str, int], Answer] = {}

    def clean(self) -> None:
        """Keep the weights: lmms-eval calls this after generation, and the same instance may be asked again."""

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Answer chat requests in batches of equal generation settings."""
        return self.answer([Asked(to_messages, *rest) for _, to_messages, *rest in _args(requests)])

    def answer(self, asked: Sequence[Asked]) -> list[GenerationResult]:
        """The answers to requests in their order, in batches of equal generation settings."""
        collator = Collator(
            [(each,) for each in asked],
            lambda entry: (entry[0].task, entry[0].doc_id),  # neighbours often ask about one video
            group_fn=lambda entry: entry[0].settings,
            grouping=True,
        )
        results, answered = [], []
        for chunk in collator.get_batched(n=self.batch_size):
            batch = [each for (each,) in chunk]
            generation = make_generation(batch[0].settings, source=f"task {batch[0].task!r}")
            clips = Clips(self.reading)
            prompts = [self.read(each, clips) for each in batch]
            answers = self._answered(prompts, generation, batch_seed(self.cell.seed, batch[0].task, batch[0].doc_id))
            for each, answer in zip(batch, answers, strict=True):
                self.answers[each.task, each.doc_id] = answer
                answered.append(answer)
                results.append(GenerationResult(answer.text, TokenCounts(answer.input_tokens, answer.output_tokens)))
        _log(answered)
        ordered: list[GenerationResult] = collator.get_original(results)
        return ordered

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Answer rounds until the task ends them; every round of all conversations is answered in batches.

        A round's messages are those that the task makes of the earlier answers.
        """
        talks = [Talk(to_messages, *rest) for _, to_messages, *rest in _args(requests)]
        while active := [talk for talk in talks if not talk.ended]:
            asked = [asked for talk in active if (asked := self._next_round(talk)) is not None]
            going = [talk for talk in active if not talk.ended]
            for talk, result in zip(going, self.answer(asked) if asked else [], strict=True):
                talk.answers.append(result.text)
        return [talk.answers for talk in talks]

    def _next_round(self, talk: Talk) -> Asked | None:
        """The next question of a conversation; None where its task ends it."""
        document = self.task_dict[talk.task][talk.split][talk.doc_id]
        messages: Any = None
        try:
            if not talk.answers:
                messages = talk.to_messages(document)
            else:
                number, said = len(talk.answers), list(talk.answers)
                found = talk.to_messages(
                    document, round_idx=number, previous_output=said, previous_round_info=talk.known
                )
                if isinstance(found, tuple) and len(found) == 4 and not found[1]:
                    messages, _, _, talk.known = found
        except Exception as error:
            where = f"task {talk.task!r}, document {talk.doc_id}, round {len(talk.answers)}"
            raise InputError(f"{where} cannot be read: {one_line(error)}") from error
        talk.ended = messages is None
        return (
            None if messages is None else Asked(lambda _: messages, talk.settings, talk.doc_id, talk.task, talk.split)
        )

    def _answered(self, prompts: Sequence[Chat], generation: Generation, seed: int) -> list[Answer]:
        """The answers to `prompts` in their order; those that cannot stand in one batch are asked in several."""
        found: dict[int, Answer] = {}
        for places in alike(prompts):
            batch = self.runner.prepare([prompts[place] for place in places])
            found |= zip(places, self.runner.answer(batch, self.cell, generation, seed=seed), strict=True)
        return [found[place] for place in range(len(prompts))]

    def read(self, asked: Asked, clips: Clips) -> Chat:
        """The chat messages of one request; InputError that names it if the task's code or its media fail."""
        source = f"task {asked.task!r}, document {asked.doc_id}"
        with pillow_defaults():
            try:
                messages = asked.messages(self.task_dict[asked.task][asked.split][asked.doc_id])
            except Exception as error:
                raise InputError(f"{source} cannot be read: {one_line(error)}") from error
            return conversation(messages, source, clips)

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Not with chat messages, for which lmms-eval builds no such requests."""
        raise NotImplementedError("multiple-choice tasks are answered with lmms-eval's option --force_simple")


@dataclass(frozen=True)
class Asked:
    """One request to generate: what makes the messages of a document, generation settings, and which document."""

    messages: Callable[[Any], Any]
    settings: dict[str, Any]
    doc_id: int
    task: str
    split: str


@dataclass
class Talk:
    """A conversation of several rounds: the task's function, the answers so far, and what the task remembers."""

    to_messages: Callable[..., Any]
    settings: dict[str, Any]
    doc_id: int
    task: str
    split: str
    answers: list[str] = field(default_factory=list)
    known: Any = None
    ended: bool = False


def _args(requests: Sequence[Any]) -> list[tuple[Any, ...]]:
    return [request.args for request in requests]


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
