"""Functions of the tiny_image tasks: pictures come from the seed in each document, no image file is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from vtc.eval.tiny.benchmark import scene_image

Doc = Mapping[str, Any]


def doc_to_visual(doc: Doc) -> list[Image.Image]:
    """The picture of the document's scene."""
    return [scene_image(doc["seed"])]


def process_results(doc: Doc, results: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Exact match of the first word, under "accuracy" and under the family; the scene number groups the errors.

    All answers are one word. A model that sees few visual tokens may fail to stop behind a correct one, which is no
    error of seeing.
    """
    words = results[0].lower().replace(".", " ").split()
    hit = float(words[:1] == [doc["answer"]])
    entry = {"score": hit, "scene": str(doc["seed"])}
    return {"accuracy": entry, doc["family"]: entry}


def mean_score(items: Sequence[Mapping[str, Any]]) -> float:
    """Mean of the scores."""
    return float(sum(item["score"] for item in items)) / len(items)


def _only(family: str) -> Callable[[Any], Any]:
    """A function that keeps the documents of one family, in memory."""

    def keep(dataset: Any) -> Any:
        return dataset.select([index for index, name in enumerate(dataset["family"]) if name == family])

    return keep


only_existence = _only("existence")
only_colour = _only("colour")
only_shape = _only("shape")
only_counting = _only("counting")
only_relation = _only("relation")
only_referring = _only("referring")
only_location = _only("location")
only_digits = _only("digits")
only_words = _only("words")
