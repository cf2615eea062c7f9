"""Functions of tiny_multi."""

from __future__ import annotations

from vtc.eval.tiny.task_functions import TaskFunctions, mean_score

__all__ = ["doc_to_messages", "doc_to_visual", "mean_score", "process_results"]

_FUNCTIONS = TaskFunctions("tiny_multi")
doc_to_visual = _FUNCTIONS.doc_to_visual
doc_to_messages = _FUNCTIONS.doc_to_messages
process_results = _FUNCTIONS.process_results
