"""Shared by all tests: no network, one thread, the table of tolerances, fresh tiny models, golden directories."""

from __future__ import annotations

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of what tests start: other tests use the other cores
# One data-set cache per process: two that build the same data set at once can take its files from each other.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="vtc-datasets-")

import gc
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from vtc.engine import taps
from vtc.testing import tiny_model
from vtc.testing.contract import LIMIT

HERE = Path(__file__).parent
torch.set_num_threads(1)
# The same examples in every run and no time limit per example, since the machine may be busy.
hypothesis.settings.register_profile("vtc", deadline=None, max_examples=80, derandomize=True, database=None)
hypothesis.settings.load_profile("vtc")


def pytest_collection_finish() -> None:
    """What is imported and collected stays to the end: the garbage collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class Limits:
    """Every tolerance of the suite (float32, CPU), each between what noise does and what a fault does.

    logits: two orders of summation differ by 1e-6 to 3e-5, a wrong mask or position moves logits by 0.1 to 20.
    broken: what a removed guard has to exceed at least, 200 times `logits`.
    attention: probabilities of two softmax implementations differ by below 1e-6; a 1 % fault in a score of a tiny
    model moves them by 1e-4. hidden: rows of a tower or of an LLM input, as `logits` but before the last layers.
    gradient: relative to the largest gradient of the parameter; noise is 1e-6.
    """

    logits: float = LIMIT
    broken: float = 1e-2
    attention: float = 5e-6
    hidden: float = LIMIT
    gradient: float = 1e-4


@pytest.fixture(scope="session")
def limits() -> Limits:
    """The table of tolerances."""
    return Limits()


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Connections to anything but this machine fail the test that opens them, even inside `except Exception`."""
    original = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        internet = self.family in (socket.AF_INET, socket.AF_INET6)
        if internet and not str(address[0]).startswith(("127.", "::1", "localhost")):
            pytest.fail(f"network use: {address!r}")
        original(self, address)

    socket.socket.connect = connect  # type: ignore[method-assign]
    yield
    socket.socket.connect = original  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def nothing_stays_attached() -> Iterator[None]:
    """A test that leaves a model attached fails itself, not the one that counts taps after it."""
    before = set(taps._taps)
    yield
    if set(taps._taps) - before:
        gc.collect()
        assert set(taps._taps) <= before, "a model is still attached"


@pytest.fixture
def clip() -> Any:
    """A fresh tiny LLaVA with a CLIP tower (class token, features of the last layer but one)."""
    return tiny_model("llava-clip")


@pytest.fixture
def siglip() -> Any:
    """A fresh tiny LLaVA with a SigLIP tower (no class token, features of the last layer)."""
    return tiny_model("llava-siglip")


@pytest.fixture(scope="session")
def run_chunks() -> Callable[..., torch.Tensor]:
    """Feed chunks to a model one after the other on one cache, then decode; last-token logits of every call.

    mask: False leaves the attention mask out (nothing may be padded). positions: False leaves the position ids to the
    model. cache: a cache of the caller's. use_cache: False feeds the whole conversation anew at every step instead.
    """

    @torch.no_grad()
    def run(
        model: Any,
        chunks: Sequence[dict[str, torch.Tensor]],
        manager: Any,
        *,
        steps: int = 3,
        mask: bool = True,
        positions: bool = True,
        cache: Any = None,
        use_cache: bool = True,
    ) -> torch.Tensor:
        batch = chunks[0]["input_ids"].shape[0]
        decoded = [{"input_ids": torch.full((batch, 1), 7 + step)} for step in range(steps)]
        ids, valid, logits = torch.empty(batch, 0).long(), torch.empty(batch, 0).long(), list[torch.Tensor]()
        with manager:
            for chunk in [*chunks, *decoded]:
                seen = ids.shape[1] if use_cache else 0
                ids = torch.cat([ids, chunk["input_ids"]], dim=1)
                valid = torch.cat([valid, chunk.get("attention_mask", torch.ones_like(chunk["input_ids"]))], dim=1)
                given = dict(chunk) if use_cache else {**chunks[0]}
                given |= {"input_ids": ids[:, seen:], "attention_mask": valid}
                if not mask:
                    del given["attention_mask"]
                if positions:
                    given["position_ids"] = (valid.cumsum(1) - 1).clamp(min=0)[:, seen:]
                output = model(**given, past_key_values=cache, use_cache=use_cache)
                cache = output.past_key_values
                logits.append(output.logits[:, -1])
        return torch.stack(logits)

    return run


# --- golden cases
@dataclass(frozen=True)
class GoldenCase:
    """One stored case: its description and the tensors beside it."""

    path: Path

    @property
    def method(self) -> str:
        return self.path.parent.name

    @property
    def name(self) -> str:
        return self.path.stem

    def description(self) -> dict[str, Any]:
        return json.loads(self.path.read_text())  # type: ignore[no-any-return]

    def tensors(self) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(self.path.with_suffix(".safetensors"))  # type: ignore[no-any-return]


def golden_directories() -> list[Path]:
    """tests/golden, then those named by VTC_GOLDEN (a path list) or else ../shared/golden beside the repository."""
    named = os.environ.get("VTC_GOLDEN")
    more = [Path(part) for part in named.split(os.pathsep)] if named else [HERE.parents[1] / "shared" / "golden"]
    missing = [str(path) for path in more if not path.is_dir()] if named else []
    if missing:
        raise pytest.UsageError(f"VTC_GOLDEN names no directory: {', '.join(missing)}")
    return [path for path in [HERE / "golden", *more] if path.is_dir()]


def golden_cases() -> list[GoldenCase]:
    """Every case below the golden directories; a copy with the same bytes counts once."""
    cases: dict[tuple[str, str, bytes], GoldenCase] = {}
    for directory in golden_directories():
        for path in sorted(directory.glob("*/case*.json")):
            cases.setdefault((path.parent.name, path.stem, path.read_bytes()), GoldenCase(path))
    return sorted(cases.values(), key=lambda case: (case.method, case.name))


@pytest.fixture(scope="session")
def all_golden_cases() -> list[GoldenCase]:
    """Every stored case, whether its method exists yet or not."""
    return golden_cases()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise `golden_case` over every stored case."""
    if "golden_case" in metafunc.fixturenames:
        metafunc.parametrize("golden_case", golden_cases(), ids=lambda case: f"{case.method}-{case.name}")


# --- memory
MEASURING = """
import os, resource, sys
import torch, vtc.ops

torch.set_num_threads(1)
for line in sys.stdin:
    setup, code = eval(line)
    if not os.fork():
        names = {"torch": torch}
        exec(setup, names)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        exec(code, names)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, flush=True)
        os._exit(0)
    if os.wait()[1]:
        print("failed", flush=True)
"""


@pytest.fixture(scope="session")
def measuring() -> Iterator[subprocess.Popen[str]]:
    """A process that has imported PyTorch and forks for every measurement."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", MEASURING], **pipes, text=True, bufsize=1) as process:
        yield process


@pytest.fixture
def peak_memory(measuring: subprocess.Popen[str]) -> Callable[[str, str], int]:
    """Bytes by which the peak memory of a process of its own grows while it runs `code` after `setup`."""

    def measure(setup: str, code: str) -> int:
        assert measuring.stdin is not None and measuring.stdout is not None
        measuring.stdin.write(f"{(setup, code)!r}\n")
        grown = measuring.stdout.readline().strip()
        assert grown.isdigit(), f"{grown}; what the process said stands above"
        return 1024 * int(grown)  # Linux counts in KiB

    return measure
