"""What a sweep needs of a task, whoever asks it: lmms-eval's tasks of a chat model, or pictures for an encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from vtc.app.preparation import Chat
from vtc.eval.failures import TaskKey
from vtc.eval.store import Record

if TYPE_CHECKING:
    from vtc.eval.messages import Clips
    from vtc.eval.scoring import Scored


class Asked(Protocol):
    """A task as answers are planned and stored."""

    @property
    def name(self) -> str:
        """What files and tables call it."""

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with its questions."""

    @property
    def key(self) -> TaskKey:
        """Name and fingerprint."""

    @property
    def repeats(self) -> int:
        """How often each question is asked."""


class Scorable(Asked, Protocol):
    """A task as answers are scored, described and shown."""

    @property
    def version(self) -> str:
        """The version that its author gave it."""

    @property
    def main_metric(self) -> str:
        """The metric by which it is judged."""

    @property
    def documents(self) -> Sized:
        """What is asked about, in the order of the numbers in answers."""

    def settings(self, overrides: Mapping[str, Any]) -> Record:
        """How it is asked, for `run.json`; overrides: generation settings of the sweep."""

    def only(self, doc_ids: Sequence[int]) -> Self:
        """The same task on these documents alone, which it numbers from 0 on."""

    def scored(self, rows: Sequence[Record], documents: int, side_files: Path | None = None) -> dict[str, Scored]:
        """The metrics of one cell from its answers to the first `documents` documents, see `vtc.eval.scoring.score`."""

    def conversation(self, doc_id: int, clips: Clips | None = None) -> Chat:
        """Pictures and question of a document; clips: how videos become frames."""

    def target(self, doc_id: int) -> str:
        """The right answer to it."""
