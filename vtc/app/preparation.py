"""From conversations to model inputs: the one path that `vtc generate`, sweeps and lmms-eval take.

Chat template, pictures, processor. What any of them refuses becomes one line that names the picture, video or question
at fault, so that one bad question in a batch can be found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from vtc import adapters
from vtc.adapters.placement import device_of
from vtc.app.images import name_of, open_image
from vtc.app.template import begins_itself
from vtc.errors import InputError, one_line

if TYPE_CHECKING:
    from PIL import Image

    from vtc.app.loading import Loaded
    from vtc.app.media import Video


class Chat(list[Mapping[str, Any]]):
    """Chat messages of one prompt, media inside them, and how messages about it call it."""

    def __init__(self, messages: Sequence[Mapping[str, Any]], source: str = "the prompt") -> None:
        super().__init__(messages)
        self.source = source


def alike(conversations: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[int]]:
    """Places of conversations that a batch may hold together: processors stack videos, so of equal numbers of frames.

    The groups are in the order of their first members, and so are the members of each.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, messages in enumerate(conversations):
        lengths = tuple(len(video.frames) for video in _media(messages, "video"))
        groups.setdefault(lengths, []).append(place)
    return list(groups.values())


def check_modalities(loaded: Loaded, messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a conversation with media that the model's family does not take, InputError."""
    if _media(messages, "video") and "video" not in (adapter := adapters.of(loaded.model)).modalities:
        source = getattr(messages, "source", "the prompt")
        raise InputError(
            f"{source} shows a video; {adapter.family} models take none: give images, or a model of another family"
        )


def asked(messages: Sequence[Mapping[str, Any]]) -> str:
    """What the user wrote in a conversation, all turns of it."""
    return "\n".join(_media([message for message in messages if message["role"] == "user"], "text"))


def _media(messages: Sequence[Mapping[str, Any]], kind: str) -> list[Any]:
    return [part[kind] for message in messages for part in _parts(message) if part["type"] == kind]


@dataclass(frozen=True)
class Rendered:
    """One conversation as a processor takes it: text with a placeholder per picture and video, and these."""

    source: str
    text: str
    images: list[Image.Image]
    videos: list[Video]


class Prepared(NamedTuple):
    """Inputs of `model.generate`, on the CPU or the model's device, and height and width of every picture in them."""

    inputs: Any
    image_sizes: list[tuple[int, int]]


def prepare(loaded: Loaded, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> Prepared:
    """Inputs of `model.generate` for `conversations`, as one left-padded batch on the model's device.

    Raises InputError for what `preprocess` refuses, and where the device has no room.
    """
    inputs, sizes = preprocess(loaded, conversations)
    return Prepared(moved(loaded.model, inputs), sizes)


def preprocess(loaded: Loaded, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> Prepared:
    """The same on the CPU, which touches no device: a thread may do it while another one uses the model.

    Messages are those of `processor.apply_chat_template`. A picture is whatever `vtc.app.images.open_image` takes,
    under "image"; a video is a `vtc.app.media.Video`, under "video". Without a chat template, placeholders and the text
    are joined. Raises InputError for what cannot be rendered, read or processed.
    """
    with loaded.processing:
        prompts = [_prompt(loaded, messages, number) for number, messages in enumerate(conversations)]
        try:
            inputs = _process(loaded.processor, prompts)
        except Exception as error:  # processors raise whatever comes
            raise _refusal(loaded, prompts, error) from error
    sizes = [(image.height, image.width) for prompt in prompts for image in prompt.images]
    return Prepared(inputs, sizes)


def moved(model: Any, inputs: Any) -> Any:
    """`inputs` on the model's device, in its type of numbers; InputError where they find no room."""
    return on_device(model, lambda: inputs.to(device_of(model), dtype=model.dtype))


def on_device(model: Any, run: Callable[[], Any]) -> Any:
    """`run()`; InputError if the device that the model lies on has no room for it or fails."""
    try:
        return run()
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"device {str(device_of(model))!r} has not enough memory for this prompt ({one_line(error)[:120]}); give "
            "fewer or smaller pictures, fewer frames, a smaller batch, --dtype bfloat16, or another --device"
        ) from error
    except torch.AcceleratorError as error:
        device = str(device_of(model))
        raise InputError(f"device {device!r} failed ({one_line(error)}); give another --device") from error


def _prompt(loaded: Loaded, messages: Sequence[Mapping[str, Any]], number: int) -> Rendered:
    source = getattr(messages, "source", f"prompt {number + 1}")
    images, videos = _media(messages, "image"), _media(messages, "video")
    check_modalities(loaded, messages)
    placeholders = {kind: getattr(loaded.processor, f"{kind}_token", None) for kind in ("image", "video")}
    written = " ".join(_media(messages, "text"))
    for placeholder in filter(None, placeholders.values()):
        if placeholder in written:
            raise InputError(f"{source} holds {placeholder!r}, which stands for a picture or video; write it otherwise")
    text = _render(loaded, messages, source)
    for kind, media in (("image", images), ("video", videos)):
        placeholder = placeholders[kind]
        if placeholder and (count := text.count(placeholder)) != len(media):
            raise InputError(
                f"the chat template of model {loaded.name!r} writes {placeholder!r} {count} times where {source} has "
                f"{len(media)} of kind {kind}; give a checkpoint whose template writes one for each"
            )
    return Rendered(source, text, [_open(image, source) for image in images], videos)


def _parts(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _open(image: Any, source: str) -> Image.Image:
    try:
        return open_image(image)
    except InputError as error:
        raise InputError(str(error) if name_of(image) != "image" else f"{source}: {error}") from error


def _render(loaded: Loaded, messages: Sequence[Mapping[str, Any]], source: str) -> str:
    """The prompt in the checkpoint's chat template; without one, placeholders and texts in the order of the parts."""
    processor = loaded.processor
    if not getattr(processor, "chat_template", None):
        pieces = []
        for part in (part for message in messages for part in _parts(message)):
            kind = part["type"]
            pieces.append(part["text"] if kind == "text" else f"{getattr(processor, f'{kind}_token')}\n")
        return "".join(pieces)
    try:
        chat = [dict(message) for message in messages]
        text: str = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return text
    except Exception as error:  # templates are programs
        raise InputError(
            f"the chat template of model {loaded.name!r} cannot write {source} ({one_line(error)}); give a checkpoint "
            "whose template takes messages with lists of parts"
        ) from error


def _process(processor: Any, prompts: Sequence[Rendered]) -> Any:
    """What the processor makes of `prompts`, on the CPU."""
    media: dict[str, Any] = {}
    if any(prompt.images for prompt in prompts):
        # Nested by prompt: a flat list would count as one image per prompt where tiling depends on that.
        media["images"] = [prompt.images for prompt in prompts]
    videos = [video for prompt in prompts for video in prompt.videos]
    if videos:
        media["videos"] = [video.frames for video in videos]
        media["videos_kwargs"] = _told(videos)
    return processor(
        text=[prompt.text for prompt in prompts],
        **media,
        padding=True,
        padding_side="left",
        add_special_tokens=not begins_itself(processor.tokenizer, prompts[0].text),
        return_tensors="pt",
    )


def _told(videos: Sequence[Video]) -> dict[str, Any]:
    return {"do_sample_frames": False, "video_metadata": [video.metadata() for video in videos]}


def _refusal(loaded: Loaded, prompts: Sequence[Rendered], error: Exception) -> InputError:
    """Why the processor refuses the batch: the first prompt that it refuses alone, and what in it is at fault."""
    refused = f"is refused by the processor of model {loaded.name!r}"
    for prompt in prompts:
        cause = _failure(lambda prompt=prompt: _process(loaded.processor, [prompt]))  # type: ignore[misc]
        if cause is not None:
            what, reason, advice = _culprit(loaded.processor, prompt) or (prompt.source, cause, "ask otherwise")
            return InputError(f"{what} {refused} ({one_line(reason)}); {advice}")
    sources = ", ".join(prompt.source for prompt in prompts)
    return InputError(f"the batch of {sources} {refused} ({one_line(error)}); ask each alone (--batch-size 1)")


def _culprit(processor: Any, prompt: Rendered) -> tuple[str, Exception, str] | None:
    """The picture or video that is refused alone, the reason and what to do; or the videos that do not go together."""
    for number, image in enumerate(prompt.images, 1):
        reason = _failure(lambda image=image: processor.image_processor(images=[image], return_tensors="pt"))  # type: ignore[misc]
        if reason is not None:
            name = name_of(image) if name_of(image) != "image" else f"image {number}"
            what = f"{name} ({image.width} x {image.height} pixels) in {prompt.source}"
            return what, reason, "give a picture of another shape"
    lengths = [len(video.frames) for video in prompt.videos]
    for number, video in enumerate(prompt.videos, 1):
        one = {"videos": [video.frames], **_told([video]), "return_tensors": "pt"}
        reason = _failure(lambda one=one: processor.video_processor(**one))  # type: ignore[misc]
        if reason is not None:
            height, width = video.frames.shape[1:3]
            name = f"video {video.name!r}" if video.name else f"video {number}"
            frames = f"{lengths[number - 1]} frame{'s' * (lengths[number - 1] > 1)}"
            what = f"{name} ({frames} of {width} x {height} pixels) in {prompt.source}"
            return what, reason, "choose more frames (--frames, --fps) or a longer video"
    if len(set(lengths)) > 1:
        what = f"{prompt.source} with videos of {' and '.join(map(str, lengths))} frames"
        cause = ValueError("it stacks them")
        return what, cause, f"choose {min(lengths)} frames of each (--frames {min(lengths)}), or ask about each alone"
    return None


def _failure(run: Callable[[], Any]) -> Exception | None:
    """What `run` raises."""
    try:
        run()
    except Exception as error:
        return error
    return None
