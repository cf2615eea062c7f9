"""A judge on this machine, and the rows of the benchmarks in files."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

VERDICTS = (
    ("Provide your evaluation only as a yes/no", "{'pred': 'yes', 'score': 4}"),
    ("Please generate the response in the form of a Python dictionary", "{'score': 3}"),
    ('just answer "None of the choices are correct"', "Reasoning: it says so\nAnswer: A. up"),
    ('respond "Correct"', "Correct"),
    ("", "A"),
)
"""What stands in a question to the judge -> what it says; the first that fits."""


class Judge(BaseHTTPRequestHandler):
    """Answers like the chat interface that the tasks' code asks."""

    asked: list[str]

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = "\n".join(message["content"] for message in question["messages"])
        self.asked.append(question["model"])
        verdict = next(said for words, said in VERDICTS if words in text)
        body = json.dumps(
            {"model": "stand-in", "usage": {"total_tokens": 1}, "choices": [{"message": {"content": verdict}}]}
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""


@pytest.fixture(scope="session")
def judge() -> Iterator[list[str]]:
    """The models that were asked for, while OPENAI_API_URL is a judge on this machine."""
    Judge.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_URL", f"http://127.0.0.1:{server.server_port}/v1/chat/completions")
        patch.setenv("OPENAI_API_KEY", "made up")
        for name in ("API_TYPE", "MODEL_VERSION", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            patch.delenv(name, raising=False)
        yield Judge.asked
    server.shutdown()
    server.server_close()
    thread.join()


Maker = Callable[[], Iterator[Mapping[str, Any]]]


@pytest.fixture(scope="session")
def write_rows(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Mapping[str, Maker]], dict[str, str]]:
    """A function that writes rows to Parquet files as the hub has them; the data map of these files."""

    def write(makers: Mapping[str, Maker]) -> dict[str, str]:
        import datasets

        folder = tmp_path_factory.mktemp("rows")
        files = {}
        for name, make in makers.items():
            file = Path(folder / f"{name.replace('/', '_').replace(':', '_')}.parquet")
            datasets.Dataset.from_list(list(make())).to_parquet(file)
            files[name] = str(file)
        return files

    return write
