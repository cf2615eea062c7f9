"""How answers to the generated tasks are scored, in sweeps and in checks alike."""

from __future__ import annotations

from collections import Counter

from vtc.eval.tiny.sample import Task


def first_word(reply: str, answer: str) -> float:
    """1 if the reply begins with the answer, which is one word.

    What follows does not count: a model that sees few visual tokens may fail to stop behind a correct answer, which is
    no error of seeing.
    """
    return float(reply.lower().replace(".", " ").replace(",", " ").split()[:1] == [answer])


def items(text: str) -> Counter[str]:
    """The things that a list names, with how often; spaces do not count.

    >>> sorted(items("red ring, blue star , red ring.").items())
    [('blue star', 1), ('red ring', 2)]
    """
    parts = (" ".join(part.split()) for part in text.lower().replace(".", " ").split(","))
    return Counter(part for part in parts if part)


def list_f1(reply: str, answer: str) -> float:
    """Harmonic mean of precision and recall over the things named, in any order, each as often as it is there."""
    named, wanted = items(reply), items(answer)
    hits = (named & wanted).total()
    return 2 * hits / (named.total() + wanted.total())


def score(task: Task, family: str, reply: str, answer: str) -> float:
    """0 to 1."""
    return first_word(reply, answer) if family in task.answers else list_f1(reply, answer)
