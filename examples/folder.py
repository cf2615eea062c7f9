"""Ask one question about every picture in a folder, in batches, from a quarter of the visual tokens.

    python examples/folder.py pictures --prompt "What color is the circle?"
    python examples/folder.py pictures --model llava-hf/llava-1.5-7b-hf --method fastv --retention 0.5

Prints a JSON object for each picture; one that cannot be read has an error in place of an answer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtc
from vtc.embedded import NAMES, model_path

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def load(name: str) -> tuple[Any, Any]:
    """Processor and model of an embedded model, a folder or a hub name; decoders want padding on the left."""
    path = model_path(name) if name in NAMES else name
    processor = AutoProcessor.from_pretrained(path)
    processor.tokenizer.padding_side = "left"
    return processor, AutoModelForImageTextToText.from_pretrained(path).to(DEVICE).eval()


def prompts(processor: Any, pictures: list[Image.Image], question: str) -> Any:
    """Inputs of `generate` for one question about each picture."""
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]
        for picture in pictures
    ]
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(chats, padding=True, **how)


def answers(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Batch after batch; the method stays attached over all of them."""
    processor, model = load(args.model)
    files = sorted(file for file in args.folder.iterdir() if file.suffix.lower() in SUFFIXES)
    with vtc.compress(model, args.method, retention=args.retention) as handle, torch.inference_mode():
        for first in range(0, len(files), args.batch_size):
            some, pictures = list[Path](), list[Image.Image]()
            for file in files[first : first + args.batch_size]:
                try:
                    pictures.append(Image.open(file).convert("RGB"))
                    some.append(file)
                except OSError as error:
                    yield {"file": file.name, "error": str(error)}
            if not pictures:
                continue
            inputs = prompts(processor, pictures, args.prompt).to(model.device)
            output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
            texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for file, text in zip(some, texts, strict=True):
                yield {"file": file.name, "answer": text, "retention": handle.stats.retention}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", default="What is shown?")
    parser.add_argument("--model", default="tiny-llava")
    parser.add_argument("--method", default="vtc_cls")
    parser.add_argument("--retention", type=float, default=0.25)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=8)
    for answer in answers(parser.parse_args()):
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
