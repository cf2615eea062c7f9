"""Servers that do not answer are named at once when a sweep is planned; libraries would try again for minutes."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vtc.errors import InputError
from vtc.eval.catalogue import load_tasks
from vtc.eval.outside import reachable, watching
from vtc.eval.rehearsal import rehearse
from vtc.eval.scoped import Mine, environment, replaced

LIMIT = 15.0
CODE = """
import os
import time

import requests
from datasets import load_dataset
from PIL import Image


def join_pictures(rows):
    pictures = load_dataset("made/up", "pictures", split="test", token=True)
    return rows


def shown(doc):
    return [Image.new("RGB", (32, 24), "red")]


def fetched(doc):
    return [{"type": "image", "url": "https://pictures.example.org/red.png"}]


def judged(doc, results):
    key = os.getenv("OPENAI_API_KEY")
    for attempt in range(5):
        try:
            return {"accuracy": float(requests.post("https://judge.example.org/v1", timeout=60).text)}
        except requests.RequestException:
            time.sleep(5)
    return {"accuracy": 0.0}


def score(doc, results):
    return {"accuracy": float(results[0] == "red")}
"""
YAML = """
task: asking
dataset_path: {path}
dataset_kwargs: {kwargs}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.{visual}
doc_to_text: question
doc_to_target: answer
process_results: !function utils.{process}
{more}
generation_kwargs: {{max_new_tokens: 3}}
metric_list: [{{metric: accuracy, aggregation: mean, higher_is_better: true}}]
"""

Made = Callable[..., Path]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """A function that writes the task `asking`; by default all it needs is local."""

    def make(
        path: str = "json", kwargs: str = "", visual: str = "shown", process: str = "score", more: str = ""
    ) -> Path:
        (tmp_path / "rows.jsonl").write_text('{"question": "Which?", "answer": "red"}\n' * 3)
        (tmp_path / "utils.py").write_text(CODE)
        kwargs = kwargs or "{data_files: {test: rows.jsonl}}"
        text = YAML.format(path=path, kwargs=kwargs, visual=visual, process=process, more=more)
        (tmp_path / "asking.yaml").write_text(text)
        return tmp_path

    return make


def refused(*_: Any, **__: Any) -> Any:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def silent(*_: Any, **__: Any) -> Any:
    threading.Event().wait(20)


@pytest.fixture(params=[refused, silent], ids=["refused", "silent"])
def offline(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No server is found, at once or after a minute, while the hub may be asked."""
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", request.param)
    monkeypatch.setenv("HF_TOKEN", "made up")  # else the libraries do not come as far as asking
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    yield


def fails(action: Callable[[], Any]) -> str:
    """What the InputError of `action` says, which may not take long."""
    began = time.monotonic()
    with pytest.raises(InputError) as caught:
        action()
    assert time.monotonic() - began < LIMIT
    return str(caught.value)


def test_a_data_set_on_the_hub(made: Made, offline: None) -> None:
    folder = made("made/up", "{token: true}")
    load_tasks(["tiny_image"])  # importing takes seconds of its own
    said = fails(lambda: load_tasks(["asking"], [folder]))
    assert "'asking' cannot be loaded here: its code loads the data set 'made/up', which is not on this machine" in said
    assert "huggingface.co cannot be reached; name a copy in a --data-map, as 'made/up: PATH'" in said


def test_pictures_that_the_code_loads_besides(made: Made, offline: None) -> None:
    folder = made(more="process_docs: !function utils.join_pictures")
    said = fails(lambda: load_tasks(["asking"], [folder]))
    assert "loads the data set 'made/up:pictures'" in said and "huggingface.co cannot be reached" in said


def test_videos_that_are_downloaded(made: Made, offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = made("made/up", "{video: true, cache_dir: clips}")
    said = fails(lambda: load_tasks(["asking"], [folder]))
    assert "loads the videos of 'made/up'" in said and "huggingface.co cannot be reached" in said
    assert said.endswith("as 'made/up: {media: FOLDER}'")


def test_without_any_network_allowed(made: Made) -> None:
    """With HF_HUB_OFFLINE, as here, no server is asked, and lmms-eval tries five times all the same."""
    folder = made("made/up", "{token: true}")
    said = fails(lambda: load_tasks(["asking"], [folder]))
    assert "the data set 'made/up', which is not on this machine: " in said


def test_a_picture_on_a_server(made: Made, offline: None) -> None:
    (task,) = load_tasks(["asking"], [made(visual="fetched")])
    assert "pictures.example.org" in fails(task.probe)


def test_a_judge_without_a_key(made: Made, offline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    (task,) = load_tasks(["asking"], [made(process="judged")])
    said = fails(lambda: rehearse(task))
    assert "'asking' is scored by a judge at judge.example.org and none of OPENAI_API_KEY is set" in said


def test_a_judge_that_does_not_answer(made: Made, offline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "made up")
    (task,) = load_tasks(["asking"], [made(process="judged")])
    said = fails(lambda: rehearse(task))
    assert "scoring task 'asking' asks judge.example.org (" in said and "cannot be reached from here" in said


def test_servers_that_accept_are_reachable_and_pauses_are_kept() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert reachable("localhost", port) is None
        with watching(patience=1.0) as calls:
            socket.create_connection(("127.0.0.1", port)).close()
            began = time.monotonic()
            time.sleep(0.1)
            assert time.monotonic() - began >= 0.1, "a server that answers may ask for patience"
        assert (calls.unreachable, calls.servers) == ([], {"127.0.0.1": port})
    assert "refused" in (reachable("127.0.0.1", port) or "")


def test_other_threads_are_left_alone() -> None:
    inside, done = threading.Event(), threading.Event()
    found: list[float] = []

    def other() -> None:
        inside.wait()
        began = time.monotonic()
        time.sleep(0.2)
        found.append(time.monotonic() - began)
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with watching(refuse=True):
        inside.set()
        done.wait()
    thread.join()
    assert found[0] >= 0.2


def test_replacements_end_in_any_order() -> None:
    before = time.sleep
    first = replaced(time, "sleep", lambda below: lambda seconds: "first", Mine())
    second = replaced(time, "sleep", lambda below: lambda seconds: ("second", below(seconds)), Mine())
    first.__enter__()
    second.__enter__()
    assert time.sleep(0) == ("second", "first")  # type: ignore[func-returns-value]
    first.__exit__(None, None, None)
    assert time.sleep(0) == ("second", None)  # type: ignore[func-returns-value]
    second.__exit__(None, None, None)
    assert time.sleep is before


def test_an_environment_is_seen_by_its_thread_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("VTC_HERE", "outside")
    inside, done = threading.Event(), threading.Event()
    found: list[str | None] = []

    def other() -> None:
        inside.wait()
        found.append(os.getenv("VTC_HERE"))
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with environment({"VTC_HERE": "inside"}):
        inside.set()
        done.wait()
        assert (os.environ["VTC_HERE"], os.getenv("VTC_HERE")) == ("inside", "inside")
    thread.join()
    assert found == ["outside"] and os.environ["VTC_HERE"] == "outside"
