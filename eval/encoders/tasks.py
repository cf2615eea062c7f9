"""What an encoder is asked about pictures: which of several classes they show, or which captions are theirs.

Texts are encoded once, by the untouched text tower; answers to a picture are what scoring needs of its features.
"""

from __future__ import annotations

import base64
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vtc.adapters.pairs import Encoder
from vtc.app.preparation import Chat
from vtc.eval.encoders.metrics import mean_of, rank_of, speed, within
from vtc.eval.failures import TaskKey
from vtc.eval.messages import Clips
from vtc.eval.scoring import Scored
from vtc.eval.store import Record

VERSION = "1"
"""Raised when the same pictures may be asked otherwise."""


@dataclass(frozen=True)
class Document:
    """A picture: what opens it, the number of its class, or its captions."""

    open: Callable[[], Image.Image]
    target: int = -1
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class PictureTask(ABC):
    """Pictures and a question about all of them. `about` is what a fingerprint stands for besides the question."""

    name: str
    documents: Sequence[Document]
    about: Any

    repeats = 1
    version = VERSION
    main_metric = ""

    @property
    def key(self) -> TaskKey:
        """Name and fingerprint."""
        return TaskKey(self.name, self.fingerprint)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the question."""
        content = json.dumps([VERSION, self.main_metric, self.about], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def settings(self, overrides: Mapping[str, Any]) -> Record:
        """What `run.json` says of it; nothing is generated."""
        return {"cluster_key": None, "prompt_profile": "default", "generation": {}, "until": []}

    def only(self, doc_ids: Sequence[int]) -> Self:
        """The same task on these documents alone, which it numbers from 0 on; its fingerprint stays."""
        part = replace(self, documents=[self.documents[doc_id] for doc_id in doc_ids])
        part.__dict__["fingerprint"] = self.fingerprint
        return part

    def conversation(self, doc_id: int, clips: Clips | None = None) -> Chat:
        """The picture of a document, and what is asked about it; there are no videos."""
        picture = {"type": "image", "image": self.documents[doc_id].open()}
        content = [picture, {"type": "text", "text": self.question}]
        return Chat([{"role": "user", "content": content}], f"task {self.name!r}, document {doc_id}")

    def scored(self, rows: Sequence[Record], documents: int, side_files: Path | None = None) -> dict[str, Scored]:
        """The metrics of one cell, the speed among them."""
        return {**self.measured(sorted(rows, key=lambda row: row["doc_id"])), "images_per_second": speed(rows)}

    @property
    @abstractmethod
    def question(self) -> str:
        """The question in words."""

    @abstractmethod
    def target(self, doc_id: int) -> str:
        """The right answer in words."""

    @abstractmethod
    def answers(self, features: Tensor, doc_ids: Sequence[int]) -> list[Record]:
        """What is stored of the features [B, D] of these documents; "text" is the answer in words."""

    @abstractmethod
    def measured(self, rows: Sequence[Record]) -> dict[str, Scored]:
        """Metrics by name from the rows of all documents, in their order."""


@dataclass(frozen=True)
class Classification(PictureTask):
    """Which class a picture shows: the one whose text is nearest. texts: [C, D], the mean over all templates."""

    classes: tuple[str, ...] = ()
    texts: Tensor | None = None

    main_metric = "top1"

    @classmethod
    def create(
        cls, name: str, documents: Sequence[Document], about: Any, encoder: Encoder, classes: Sequence[str],
        templates: Sequence[str],
    ) -> Classification:  # fmt: skip
        """Encode every class in every template, which holds {} in its place."""
        every = [template.replace("{}", each) for each in classes for template in templates]
        mean = encoder.texts(every).view(len(classes), len(templates), -1).mean(1)
        texts = torch.nn.functional.normalize(mean, dim=-1)
        return cls(name, documents, [about, list(classes), list(templates)], tuple(classes), texts)

    @property
    def question(self) -> str:
        """What the picture shows."""
        return f"one of {len(self.classes)} classes"

    def target(self, doc_id: int) -> str:
        """The name of its class."""
        return self.classes[self.documents[doc_id].target]

    def answers(self, features: Tensor, doc_ids: Sequence[int]) -> list[Record]:
        """The nearest class, and how many stand in front of the right one."""
        assert self.texts is not None
        near = (features @ self.texts.T).float()
        ranks = rank_of(near, torch.tensor([self.documents[doc_id].target for doc_id in doc_ids]))
        best = near.argmax(1).tolist()
        return [
            {"text": self.classes[nearest], "rank": rank} for nearest, rank in zip(best, ranks.tolist(), strict=True)
        ]

    def measured(self, rows: Sequence[Record]) -> dict[str, Scored]:
        """Shares of pictures whose class is the nearest, and among the nearest five where there are more."""
        ranks = np.array([row["rank"] for row in rows])
        return {f"top{k}": mean_of(ranks < k) for k in (1, 5) if k == 1 or k < len(self.classes)}


@dataclass(frozen=True)
class Retrieval(PictureTask):
    """Captions for pictures and pictures for captions, among all documents. texts: [captions, D] of each document."""

    texts: Sequence[Tensor] = ()

    main_metric = "image_to_text_r1"

    @classmethod
    def create(cls, name: str, documents: Sequence[Document], about: Any, encoder: Encoder) -> Retrieval:
        """Encode every caption."""
        every = encoder.texts([caption for document in documents for caption in document.captions])
        counts = [len(document.captions) for document in documents]
        return cls(name, documents, about, torch.split(every.float().cpu(), counts))

    def only(self, doc_ids: Sequence[int]) -> Self:
        """The same on these documents, among which everything is sought."""
        part = replace(self, texts=[self.texts[doc_id] for doc_id in doc_ids])
        return PictureTask.only(part, doc_ids)

    @property
    def question(self) -> str:
        """What is sought."""
        return "its captions among those of all pictures"

    def target(self, doc_id: int) -> str:
        """Its captions."""
        return " / ".join(self.documents[doc_id].captions)

    def answers(self, features: Tensor, doc_ids: Sequence[int]) -> list[Record]:
        """The features themselves, float32 in base64: a caption's rank depends on all pictures."""
        rows = features.float().cpu().numpy().astype("<f4")
        return [{"text": "", "features": base64.b64encode(row.tobytes()).decode()} for row in rows]

    def measured(self, rows: Sequence[Record]) -> dict[str, Scored]:
        """Recall at 1, 5 and 10 both ways: of pictures, any caption of which is found, and of captions.

        A picture's score for its captions is the share of them that find it, weighted by their number.
        """
        packed = b"".join(base64.b64decode(row["features"]) for row in rows)
        features = torch.from_numpy(np.frombuffer(packed, "<f4").reshape(len(rows), -1).copy())
        own = self.texts[: len(rows)]
        to_text, to_image = within(features, own)
        counts = np.array([len(texts) for texts in own])
        starts = np.cumsum(counts) - counts
        found = {}
        for k in (1, 5, 10):
            found[f"image_to_text_r{k}"] = mean_of(to_text < k)
        for k in (1, 5, 10):
            hits = np.add.reduceat((to_image < k).astype(np.float64), starts)
            found[f"text_to_image_r{k}"] = mean_of(hits / counts.mean())
        return found
