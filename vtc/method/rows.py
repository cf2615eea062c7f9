"""The ready readings by short names."""

from __future__ import annotations

from vtc.method.llm_readings import GroupSums, LastRow, LastRowAhead, PromptSum, QuestionAhead, Transition
from vtc.method.vision_readings import ClassLogits, ClassRow, ClassToPatches, Keys, LayerOutput, Pixels, Received


class Rows:
    """The ready readings.

    >>> import vtc
    >>> vtc.Needs(vision={22: Rows.CLS}, llm={1: (Rows.LAST, Rows.GROUP_SUMS)}).vision_pairs
    ((22, ClassRow()),)
    """

    PIXELS = Pixels()

    CLS = ClassRow()
    CLS_PATCHES = ClassToPatches()
    CLS_LOGITS = ClassLogits()
    RECEIVED = Received()
    KEYS = Keys()
    HIDDEN = LayerOutput()
    LAST = LastRow()
    LAST_AHEAD = LastRowAhead()
    SUM = PromptSum()
    GROUP_SUMS = GroupSums()
    QUESTION_AHEAD = QuestionAhead()
    TRANSITION = Transition()
