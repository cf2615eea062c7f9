"""What identifies a checkpoint: any byte of any file that decides what a model answers."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import vtc.method.checkpoint
from vtc.embedded import model_path
from vtc.method.checkpoint import NAME, PARTS, digests, file_digest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the embedded model."""
    shutil.copytree(model_path("tiny-llava"), tmp_path / "model")
    return tmp_path / "model"


def changed(before: dict[str, str], folder: Path) -> list[str]:
    now = digests(folder)
    return [part for part in PARTS if now[part] != before[part]]


def test_half_of_the_weights_zeroed_is_another_model(folder: Path) -> None:
    before = digests(folder)
    assert digests(folder) == before
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + len(content) // 4] = bytes(len(content) // 4)
    file.write_bytes(content)
    assert changed(before, folder) == ["weights"]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("pytorch_model-00001-of-00002.bin", "weights"),
        ("model.safetensors.index.json", "weights"),
        ("config.json", "configuration"),
        ("generation_config.json", "generation configuration"),
        ("chat_template.jinja", "chat template"),
        ("preprocessor_config.json", "processor"),
        ("processor_config.json", "processor"),
        ("tokenizer.json", "processor"),
        ("tokenizer_config.json", "processor"),
        ("video_preprocessor_config.json", "processor"),
        ("additional_chat_templates/tools.jinja", "chat template"),
    ],
)
def test_every_part_counts_and_is_named(folder: Path, name: str, part: str) -> None:
    file = folder / name
    before = digests(folder)
    file.parent.mkdir(exist_ok=True)
    file.write_bytes((file.read_bytes() if file.exists() else b"") + b" ")
    assert changed(before, folder) == [part]


def test_every_file_of_the_embedded_model_is_in_a_part() -> None:
    folder = model_path("tiny-llava")
    counted = {file for patterns in PARTS.values() for pattern in patterns for file in folder.glob(pattern)}
    there = {file for file in folder.iterdir() if file.is_file()}
    assert {file.name for file in there - counted} <= {"training.json"}  # how it was made, which no one loads


def test_large_files_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []
    original = vtc.method.checkpoint.content_digest
    monkeypatch.setattr(vtc.method.checkpoint, "REMEMBERED", 10)
    monkeypatch.setattr(vtc.method.checkpoint, "content_digest", lambda file: (reads.append(file), original(file))[1])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    home = tmp_path / "model"
    home.mkdir()
    file = home / "w.safetensors"
    file.write_bytes(b"0123456789ab")
    first = file_digest(file)
    assert (file_digest(file), len(reads)) == (first, 1) and (home / NAME).exists()
    file.write_bytes(b"0123456789ac")  # as large, later
    os.utime(file, ns=(1, 1))
    assert file_digest(file) != first and len(reads) == 2
    (home / NAME).write_text("[not json")
    assert len({file_digest(file), file_digest(file)}) == 1 and len(reads) == 3
    # Where nothing can be written beside the file, the user's cache folder remembers.
    (home / NAME).unlink()
    (home / NAME).mkdir()
    file_digest(file)
    file_digest(file)
    assert len(reads) == 4 and (tmp_path / "cache" / "vtc" / "digests.json").exists()
