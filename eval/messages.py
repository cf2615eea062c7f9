"""lmms-eval's chat messages in the form that a processor's chat template takes, with the media opened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vtc.app.images import open_image
from vtc.app.media import Video
from vtc.app.preparation import Chat
from vtc.app.video_reading import VideoReading
from vtc.errors import InputError, one_line


def conversation(messages: Any, source: str, clips: Clips | None = None) -> Chat:
    """Chat `messages` with pictures as PIL in RGB and videos as `vtc.app.media.Video`, in their places between texts.

    clips: how videos become frames, and those that other conversations have shown already.

    Raises:
        InputError: no chat messages, audio, or a picture or video that cannot be read; the message names `source`.
    """
    from lmms_eval.protocol import ChatMessages

    try:
        converted: list[dict[str, Any]] = ChatMessages(messages=messages).to_hf_messages()
    except ValueError as error:
        raise InputError(f"{source} is not made of chat messages: {one_line(error)}") from error
    clips = clips or Clips()
    for message in converted:
        message["content"] = [_opened(part, source, clips) for part in message["content"]]
    return Chat(converted, source)


class Clips:
    """Videos as conversations name them, each part of each file decoded once for all of them."""

    def __init__(self, reading: VideoReading | None = None) -> None:
        self.reading = reading or VideoReading()
        self._decoded: dict[tuple[str, Any, Any], Video] = {}

    def video(self, part: Mapping[str, Any]) -> Video:
        """The clip of a part of type "video", with its file or frames under "video"."""
        source, start, end = part["video"], part.get("video_start"), part.get("video_end")
        if isinstance(source, Mapping):  # lmms-eval hands the whole entry on where it names a part of a file
            start, end = source.get("video_start"), source.get("video_end")
            source = source.get("url") or source.get("path") or source.get("video")
        if not isinstance(source, str):
            return self.reading.read(source, start, end)
        key = source, start, end
        if key not in self._decoded:
            self._decoded[key] = self.reading.read(source, start, end)
        return self._decoded[key]


def _opened(part: dict[str, Any], source: str, clips: Clips) -> dict[str, Any]:
    kind = part["type"]
    if kind == "text":
        return part
    try:
        if kind == "image":
            return {"type": kind, "image": open_image(part["image"])}
        if kind == "video":
            return {"type": kind, "video": clips.video(part)}
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    raise InputError(f"{source}: {kind} input; this version evaluates images and videos")
