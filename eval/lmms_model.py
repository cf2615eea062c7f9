"""The model that lmms-eval's own command line runs::

    python -m lmms_eval --model vtc --model_args pretrained=tiny-llava,method=vtc_cls,retention=0.25 --tasks ...

One process answers one cell; `vtc sweep` compares many and resumes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.utils import Collator

import vtc
from vtc import loading
from vtc.compressor import Positions
from vtc.errors import InputError, one_line
from vtc.eval.catalogue import conversation
from vtc.eval.cells import BASELINE, Cell
from vtc.eval.generation import make_generation
from vtc.eval.runner import Answer, Runner, batch_seed
from vtc.images import pillow_defaults
from vtc.preparation import Chat


class VTC(lmms):  # type: ignore[misc]
    """A model under one compression method at one retention, for lmms-eval.

    `pretrained` is what `vtc.loading.load` takes. `method` is ``none`` for the untouched model. Further arguments are
    hyper-parameters of the method; one that it does not have is refused. `answers` holds token counts by task and
    document, which lmms-eval has no place for.

    Raises:
        VTCError: an unknown method, hyper-parameter or model.
    """

    is_simple = False
    accelerator = None  # else lmms-eval builds one

    def __init__(
        self,
        pretrained: str = "tiny-llava",
        method: str = BASELINE,
        retention: float | str = 1.0,
        positions: Positions | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        revision: str | None = None,
        seed: int | str = 0,
        max_batch_size: int | None = None,
        **hyper_parameters: Any,
    ) -> None:
        super().__init__()
        if method == BASELINE and hyper_parameters:
            raise InputError(f"unknown model_args: {', '.join(hyper_parameters)}; hyper-parameters need a method")
        compressor = None if method == BASELINE else vtc.create(method, **hyper_parameters)
        if compressor is not None and "seed" in {f.name for f in dataclasses.fields(compressor)}:
            compressor = vtc.create(method, **hyper_parameters, seed=int(seed))
        loaded = loading.load(
            pretrained,
            device=device or "auto",
            dtype=dtype,
            attn_implementation=attn_implementation,
            revision=revision,
        )
        self.runner = Runner(loaded)
        cell = Cell(
            label=method,
            method=method,
            version=1 if compressor is None else compressor.version,
            parameters={} if compressor is None else dataclasses.asdict(compressor),
            retention=float(retention),
            positions=positions,
            seed=int(seed),
            generation={},
            model=loaded.fingerprint(),
            compressor=compressor,
        )
        self.cell = self.runner.check(cell)
        self.batch_size = int(batch_size)
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
            prompts = []
            for _, to_messages, _, doc_id, name, split in chunk:
                prompts.append(self._read(to_messages, name, split, doc_id))
            answers = self.runner.answer(
                self.runner.prepare(prompts), self.cell, generation, seed=batch_seed(self.cell.seed, task, first)
            )
            for (_, _, _, doc_id, name, _), answer in zip(chunk, answers, strict=True):
                self.answers[name, doc_id] = answer
                answered.append(answer)
                results.append(GenerationResult(answer.text, TokenCounts(answer.input_tokens, answer.output_tokens)))
        _log(answered)
        ordered: list[GenerationResult] = collator.get_original(results)
        return ordered

    def _read(self, to_messages: Any, task: str, split: str, doc_id: int) -> Chat:
        """The chat messages of one document; InputError that names it if the task's code or its pictures fail."""
        source = f"task {task!r}, document {doc_id}"
        with pillow_defaults():
            try:
                messages = to_messages(self.task_dict[task][split][doc_id])
            except Exception as error:
                raise InputError(f"{source} cannot be read: {one_line(error)}") from error
            return conversation(messages, source)

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Not offered."""
        raise NotImplementedError("vtc answers generate_until tasks")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        """Not offered."""
        raise NotImplementedError("vtc answers generate_until tasks")


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
