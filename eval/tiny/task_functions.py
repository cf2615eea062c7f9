"""What the folders under `tasks` share: documents hold a seed, and pictures or frames are rendered from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from vtc.eval.tiny import scoring
from vtc.eval.tiny.benchmark import sample
from vtc.eval.tiny.tasks import TASKS

Doc = Mapping[str, Any]


@dataclass(frozen=True)
class TaskFunctions:
    """The functions of one task that lmms-eval calls."""

    name: str

    def doc_to_visual(self, doc: Doc) -> list[Image.Image]:
        """The pictures, or the frames, of the document's sample."""
        return [Image.fromarray(picture) for picture in sample(self.name, doc["seed"]).pictures]

    def doc_to_messages(self, doc: Doc) -> list[dict[str, Any]]:
        """One user message: the pictures, or the frames of a clip as one video, then the question."""
        visuals = self.doc_to_visual(doc)
        if TASKS[self.name].media == "video":
            media: list[dict[str, Any]] = [{"type": "video", "url": visuals}]
        else:
            media = [{"type": "image", "url": picture} for picture in visuals]
        return [{"role": "user", "content": [*media, {"type": "text", "text": doc["question"]}]}]

    def process_results(self, doc: Doc, results: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The score under "accuracy" and under the family; the seed of the sample groups the errors."""
        value = scoring.score(TASKS[self.name], doc["family"], results[0], doc["answer"])
        entry = {"score": value, "scene": str(doc["seed"])}
        return {"accuracy": entry, doc["family"]: entry}


def mean_score(entries: Sequence[Mapping[str, Any]]) -> float:
    """Mean of the scores."""
    return float(sum(entry["score"] for entry in entries)) / len(entries)
