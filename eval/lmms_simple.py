"""The model as lmms-eval's older interface asks it: pictures and a text instead of chat messages.

lmms-eval makes requests for likelihoods, which multiple-choice tasks need, in this form only: ``--force_simple``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.task import ConfigurableMessagesTask

from vtc.app.preparation import Chat, alike
from vtc.errors import InputError
from vtc.eval.lmms_model import VTC, Asked
from vtc.eval.messages import Clips


class SimpleVTC(VTC):
    """The same model for requests of pictures and text: to generate, and to tell how likely completions are."""

    is_simple = True

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests of pictures and a text."""
        asked = []
        for context, settings, to_visual, doc_id, task, split in (request.args for request in requests):
            asked.append(Asked(_messages(context, to_visual), settings, doc_id, task, split))
        return self.answer(asked)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        """Refused: chat messages tell the rounds apart, a text does not."""
        raise InputError("tasks of several rounds are answered as chats; leave --force_simple out")

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Of each completion its loss and whether greedy decoding would write it, in the order of `requests`.

        The loss is the mean over the completion's tokens: lmms-eval's multiple-choice tasks take the smallest. What a
        chat template writes behind an answer is not part of it. The pair stands where a text is expected, because
        lmms-eval 0.7.3 makes a text of anything else.

        Raises:
            InputError: a request without a document, with which a task would weigh choices by themselves.
        """
        found: list[GenerationResult] = []
        waiting = iter(requests)
        while chunk := list(islice(waiting, self.batch_size)):
            prompts, completions = [], []
            clips = Clips(self.reading)
            for request in chunk:
                if len(request.args) < 6:
                    raise InputError(
                        f"task {request.task_name!r} asks how likely a choice is without its question, for the metric "
                        "acc_mutual_info; choose another metric"
                    )
                context, target, to_visual, doc_id, task, split = request.args
                prompts.append(self.read(Asked(_messages(context, to_visual), {}, doc_id, task, split), clips))
                document = self.task_dict[task][split][doc_id]
                completions.append(target if isinstance(target, str) else target(document))
            found += self._likely(prompts, completions)
        return found

    def _likely(self, prompts: Sequence[Chat], completions: Sequence[str]) -> list[GenerationResult]:
        found: dict[int, GenerationResult] = {}
        for places in alike(prompts):
            batch = self.runner.prepare([prompts[place] for place in places])
            likely = self.runner.likelihoods(batch, self.cell, [completions[place] for place in places])
            found |= {p: GenerationResult((each.loss, each.greedy)) for p, each in zip(places, likely, strict=True)}
        return [found[place] for place in range(len(prompts))]


def _messages(context: str, to_visual: Callable[[Any], Any]) -> Callable[[Any], list[dict[str, Any]]]:
    """What makes the user's turn of a document: its media, then the text without placeholders of its own."""

    def messages(document: Any) -> list[dict[str, Any]]:
        text = context.replace("<image>", "").strip()
        turn: list[dict[str, Any]] = ConfigurableMessagesTask._build_user_turn(to_visual(document), text)
        return turn

    return messages
