"""A small HTTP service: one worker collects requests into batches and answers them from fewer visual tokens.

    pip install fastapi uvicorn
    python examples/server.py --model tiny-llava --method vtc_cls --retention 0.25
    curl -s localhost:8000/answer -H 'content-type: application/json' \
         -d "{\"question\": \"What color is the circle?\", \"image\": \"$(base64 -w0 photo.jpg)\"}"

`Answers` is all there is to it; FastAPI only stands in front.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import queue
import threading
from concurrent.futures import Future
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtc
from vtc.embedded import NAMES, model_path

Waiting = tuple[Image.Image, str, Future[str]]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Answers:
    """Questions in, futures out. One thread owns the model; whatever waits while it works is its next batch."""

    def __init__(self, model: str, method: str, retention: float, most: int = 8) -> None:
        path = model_path(model) if model in NAMES else model
        self.processor = AutoProcessor.from_pretrained(path)
        self.processor.tokenizer.padding_side = "left"
        self.model = AutoModelForImageTextToText.from_pretrained(path).to(DEVICE).eval()
        self.handle = vtc.compress(self.model, method, retention=retention, trace=False)  # stays attached
        self.most = most
        self._waiting: queue.Queue[Waiting | None] = queue.Queue()
        self._worker = threading.Thread(target=self._work, daemon=True)
        self._worker.start()

    def close(self) -> None:
        """Answer what is waiting, then leave the model as it was."""
        self._waiting.put(None)
        self._worker.join()
        self.handle.detach()

    def ask(self, picture: Image.Image, question: str) -> Future[str]:
        """The answer, later."""
        future: Future[str] = Future()
        self._waiting.put((picture, question, future))
        return future

    def _work(self) -> None:
        while batch := self._next():
            try:
                self._resolve(batch)
            except Exception:  # one of them cannot be answered; the others can
                for one in batch:
                    try:
                        self._resolve([one])
                    except Exception as error:
                        one[2].set_exception(error)

    def _next(self) -> list[Waiting]:
        """What waits, at least one question; nothing once the service is closed."""
        batch: list[Waiting] = []
        while len(batch) < self.most and not (batch and self._waiting.empty()):
            one = self._waiting.get()
            if one is None:
                self._waiting.put(None)
                break
            batch.append(one)
        return batch

    def _resolve(self, batch: list[Waiting]) -> None:
        texts = self._answer([(picture, question) for picture, question, _ in batch])
        for (*_, future), text in zip(batch, texts, strict=True):
            future.set_result(text)

    @torch.inference_mode()
    def _answer(self, asked: list[tuple[Image.Image, str]]) -> list[str]:
        chats = [
            [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]
            for picture, question in asked
        ]
        how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = self.processor.apply_chat_template(chats, padding=True, **how)
        output = self.model.generate(**inputs.to(DEVICE), max_new_tokens=16, do_sample=False)
        texts: list[str] = self.processor.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return texts


def make_app(answers: Answers) -> Any:
    """The service: POST /answer with a question and a picture in base64, GET /health."""
    from fastapi import Body, FastAPI, HTTPException

    app = FastAPI()

    @app.post("/answer")
    def answer(question: str = Body(), image: str = Body()) -> dict[str, str]:
        try:
            picture = Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB")
        except (ValueError, OSError) as error:
            raise HTTPException(400, f"`image` is not a picture in base64: {error}") from error
        return {"answer": answers.ask(picture, question).result()}

    @app.get("/health")
    def health() -> dict[str, Any]:
        stats = answers.handle.stats
        return {"calls": stats.count, "retention": stats.retention if stats.count else None}

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-llava")
    parser.add_argument("--method", default="vtc_cls")
    parser.add_argument("--retention", type=float, default=0.25)
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    import uvicorn

    with contextlib.closing(Answers(args.model, args.method, args.retention)) as answers:
        uvicorn.run(make_app(answers), port=args.port)


if __name__ == "__main__":
    main()
