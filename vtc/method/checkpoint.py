"""What identifies a checkpoint folder: every byte of the files that decide what a model answers, part by part.

Large files are read once: their digests are remembered beside them, with size and time of the last change, or in the
user's cache folder where nothing can be written beside them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

PARTS = {
    "weights": ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.index.json", "adapter_config.json"),
    "configuration": ("config.json", "open_clip_config.json", "*.py"),
    "generation configuration": ("generation_config.json",),
    "chat template": ("chat_template*", "additional_chat_templates/*"),
    "processor": (
        "*processor_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
        "*.model", "*.tiktoken",
    ),
}  # fmt: skip
"""Part of a checkpoint -> its files, as patterns inside the folder."""
REMEMBERED = 1 << 26
"""Files of at least so many bytes are not read again while size and time of the last change stay."""
NAME = ".vtc-digests.json"


def digests(folder: Path) -> dict[str, str]:
    """16 hexadecimal digits for each of `PARTS`, which change with any byte, name or number of its files."""
    found = {}
    for part, patterns in PARTS.items():
        digest = hashlib.sha256()
        for file in sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}):
            digest.update(f"{file.relative_to(folder)}:{file_digest(file)}\n".encode())
        found[part] = digest.hexdigest()[:16]
    return found


def file_digest(file: Path) -> str:
    """SHA-256 of a file's content, remembered if the file is large."""
    state = file.stat()
    if state.st_size < REMEMBERED:
        return content_digest(file)
    name, about = str(file.resolve()), [state.st_size, state.st_mtime_ns]
    for memory in _memories(file):
        known = _load(memory).get(name)
        if isinstance(known, list) and known[:2] == about:
            return str(known[2])
    digest = content_digest(file)
    for memory in _memories(file):
        with contextlib.suppress(OSError):
            _save(memory, {**_load(memory), name: [*about, digest]})
            break
    return digest


def content_digest(file: Path) -> str:
    """SHA-256 of a file's content, read now."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def user_cache() -> Path:
    """The folder in which programs keep what they can make again: XDG_CACHE_HOME, or .cache of the user.

    >>> user_cache().is_absolute()
    True
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _memories(file: Path) -> Iterator[Path]:
    """Where digests are looked up, and written to the first that takes them."""
    yield file.parent / NAME
    yield user_cache() / "vtc" / "digests.json"


def _load(memory: Path) -> dict[str, object]:
    try:
        content = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _save(memory: Path, content: dict[str, object]) -> None:
    memory.parent.mkdir(parents=True, exist_ok=True)
    partial = memory.with_name(f"{memory.name}.{os.getpid()}")
    partial.write_text(json.dumps(content), encoding="utf-8")
    os.replace(partial, memory)
