"""lmms-eval tasks as a sweep sees them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from vtc.errors import InputError, UnknownName
from vtc.eval.catalogue import list_tasks, load_tasks
from vtc.eval.messages import conversation

WriteTask = Callable[..., Path]


def test_a_local_task_is_loaded_with_its_questions_and_settings(blobs: Any) -> None:
    assert (blobs.name, len(blobs.documents), blobs.repeats, blobs.version) == ("blobs", 10, 1, "2.0")
    assert blobs.main_metric == "accuracy"
    assert blobs.generation({}).arguments["max_new_tokens"] == 3
    assert blobs.generation({"max_new_tokens": 7}).arguments["max_new_tokens"] == 7


def test_a_document_becomes_chat_messages_with_pictures(blobs: Any) -> None:
    (message,) = blobs.conversation(1)
    assert message["role"] == "user"
    picture, text = message["content"]
    assert picture["type"] == "image" and picture["image"].size == (120, 90) and picture["image"].mode == "RGB"
    assert text == {"type": "text", "text": "Where is the red ring relative to the blue star?"}


def test_the_stop_string_that_lmms_eval_adds_is_dropped_and_the_tasks_own_kept(
    tmp_path: Path, write_task: WriteTask
) -> None:
    write_task(tmp_path, "plain", generation="generation_kwargs: {max_new_tokens: 2}")
    write_task(tmp_path, "own", generation='generation_kwargs: {max_new_tokens: 2, until: ["."]}')
    plain, own = load_tasks(["plain", "own"], [tmp_path])
    assert plain.lmms.config.generation_kwargs["until"] == ["\n\n"]
    assert plain.generation({}).until == ()
    assert own.generation({}).until == (".",)


def test_tags_are_expanded_and_no_task_is_loaded_twice() -> None:
    names = [task.name for task in load_tasks(["tiny_image_words", "tiny_image_families"])]
    assert names[0] == "tiny_image_words"
    assert len(names) == len(set(names)) == 9


def test_unknown_tasks_are_refused_with_near_matches(task_folder: Path) -> None:
    with pytest.raises(UnknownName, match=r"unknown task 'blob'; did you mean 'blobs'.*`vtc tasks --all`"):
        load_tasks(["blob"], [task_folder])


def test_tasks_that_are_not_generate_until_are_refused(tmp_path: Path, write_task: WriteTask) -> None:
    write_task(tmp_path, "choice", output_type="multiple_choice", generation="doc_to_choice: [red, left]")
    with pytest.raises(InputError, match="task 'choice' is of type multiple_choice; a sweep answers generate_until"):
        load_tasks(["choice"], [tmp_path])


def test_a_task_that_does_not_load_says_why(tmp_path: Path, write_task: WriteTask) -> None:
    write_task(tmp_path, "broken")
    (tmp_path / "utils.py").write_text("raise KeyError('no judge configured')")
    with pytest.raises(InputError, match="task 'broken' cannot be loaded here: KeyError: 'no judge configured'"):
        load_tasks(["broken"], [tmp_path])


def test_an_include_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"include path .* is not a folder"):
        load_tasks(["blobs"], [tmp_path / "nowhere"])


def test_a_task_whose_questions_cannot_be_read_is_refused(tmp_path: Path, write_task: WriteTask) -> None:
    folder = write_task(tmp_path)
    (folder / "utils.py").write_text((folder / "utils.py").read_text().replace('doc["shift"]', 'doc["angle"]'))
    (task,) = load_tasks(["blobs"], [folder])
    with pytest.raises(InputError, match="task 'blobs': its first question cannot be read: KeyError: 'angle'"):
        task.probe()


def test_the_fingerprint_knows_settings_code_and_data_but_not_the_place(tmp_path: Path, write_task: WriteTask) -> None:
    def fingerprint(folder: Path, profile: str = "default") -> str:
        return load_tasks(["blobs"], [folder], profile)[0].fingerprint

    original = write_task(tmp_path / "a")
    first = fingerprint(original)
    assert fingerprint(original) == first
    moved = tmp_path / "b"
    shutil.copytree(original, moved)
    assert fingerprint(moved) == first
    assert fingerprint(moved, "qwen2_5_vl") != first
    (moved / "utils.py").write_text((moved / "utils.py").read_text() + "\n# other code\n")
    assert fingerprint(moved) != first
    shutil.copy(original / "utils.py", moved)
    lines = (moved / "blobs.jsonl").read_text()
    (moved / "blobs.jsonl").write_text(lines.replace("relative to", "beside"))
    assert fingerprint(moved) != first
    (moved / "blobs.jsonl").write_text(lines)
    settings = (moved / "blobs.yaml").read_text()
    (moved / "blobs.yaml").write_text(settings.replace("max_new_tokens: 3", "max_new_tokens: 4"))
    assert fingerprint(moved) != first


def test_the_list_holds_embedded_and_included_tasks(task_folder: Path) -> None:
    listed = {entry["name"]: entry for entry in list_tasks([task_folder])}
    assert listed["blobs"] == {"name": "blobs", "kind": "task", "folder": str(task_folder)}
    assert listed["tiny_image"]["kind"] == "task"
    assert listed["tiny_image_families"]["kind"] == "tag"


def test_pictures_of_messages_are_read_as_generate_reads_them(tmp_path: Path) -> None:
    shown = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    raw = Image.fromarray(shown).transpose(Image.Transpose.ROTATE_90)
    exif = raw.getexif()
    exif[0x0112] = 6
    raw.save(file := tmp_path / "phone.png", exif=exif)
    with Image.open(file) as opened:
        opened.load()
    for url in (str(file), file.as_uri(), file.read_bytes(), opened, opened.convert("RGB")):
        messages = [{"role": "user", "content": [{"type": "image", "url": url}]}]
        found = conversation(messages, "task 'x', document 3")
        assert np.array_equal(np.asarray(found[0]["content"][0]["image"]), shown)
        assert found.source == "task 'x', document 3"


def test_messages_that_cannot_be_used_name_their_document(tmp_path: Path) -> None:
    def image(url: Any) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [{"type": "image", "url": url}]}]

    for messages, words in (
        (image(str(tmp_path / "none.png")), r"image '.*none\.png' does not exist"),
        (image(str(tmp_path)), "is a folder"),
        (image(3), "a picture cannot be of type int"),
        (image("https://127.0.0.1:1/a.png"), "cannot be fetched"),
        ([{"role": "narrator", "content": []}], "is not made of chat messages"),
        ([{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}], "audio input; this version evaluates"),
        ([{"role": "user", "content": [{"type": "video", "url": "no.mp4"}]}], r"video 'no\.mp4' does not exist"),
    ):
        with pytest.raises(InputError, match=f"task 'x', document 3.*{words}") as refused:
            conversation(messages, "task 'x', document 3")
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("lenient", [False, True])
def test_a_broken_picture_is_refused_also_where_the_tasks_code_reads_it(
    tmp_path: Path, write_task: WriteTask, monkeypatch: pytest.MonkeyPatch, lenient: bool
) -> None:
    """lmms-eval tells Pillow to fill up broken files with grey when it is imported."""
    folder = write_task(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file := tmp_path / "broken.jpg")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    code = "import io, pathlib\n" + (folder / "utils.py").read_text()
    opened = f"Image.open(io.BytesIO(pathlib.Path({str(file)!r}).read_bytes()))"
    for reading in (opened, f'{opened}.convert("RGB")'):
        (folder / "utils.py").write_text(
            "import io, pathlib\n" + code.replace("return [picture]", f"return [{reading}]")
        )
        (task,) = load_tasks(["blobs"], [folder])
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
        with pytest.raises((InputError, OSError), match="truncated"):
            task.conversation(0)
        with pytest.raises(InputError, match=r"task 'blobs'.*truncated"):
            task.probe()
        assert lenient == ImageFile.LOAD_TRUNCATED_IMAGES
