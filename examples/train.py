"""Fine-tune a model behind compressed inputs with the Trainer of transformers: a few steps on drawn circles.

    python examples/train.py --steps 3

`pad_output=True` puts the logits back at their input positions, so that labels and the Trainer work unchanged; only the
answer is a label. What the model learns here is nothing new; put a data set and a checkpoint of yours in their places.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

import vtc
from vtc.embedded import NAMES, model_path

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220)}
QUESTION = "What color is the circle?"


class Circles(torch.utils.data.Dataset[dict[str, Any]]):
    """Pictures of one circle each, and its colour as the answer."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Any]:
        answer = list(COLOURS)[index % len(COLOURS)]
        picture = Image.new("RGB", (168, 168), (235, 235, 235))
        ImageDraw.Draw(picture).ellipse((30, 30, 90 + 5 * index, 90 + 5 * index), fill=COLOURS[answer])
        return {"picture": picture, "answer": answer}


class Collate:
    """Samples -> a batch whose labels are the answers' tokens, everything in front of them -100."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        processor.tokenizer.padding_side = "left"  # answers end in the same column

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        chat = [{"role": "user", "content": content}]
        prompt = self.processor.apply_chat_template(chat, add_generation_prompt=True)
        texts = [f"{prompt} {sample['answer']}" for sample in samples]
        pictures = [sample["picture"] for sample in samples]
        batch = self.processor(images=pictures, text=texts, padding=True, return_tensors="pt")
        labels = torch.full_like(batch["input_ids"], -100)
        for row, sample in enumerate(samples):
            length = len(self.processor.tokenizer(sample["answer"], add_special_tokens=False)["input_ids"])
            labels[row, -length:] = batch["input_ids"][row, -length:]
        return {**batch, "labels": labels}


def train(model_name: str, method: str, retention: float, steps: int) -> list[float]:
    """The losses of the steps."""
    path = model_path(model_name) if model_name in NAMES else model_name
    processor = AutoProcessor.from_pretrained(path)
    model = AutoModelForImageTextToText.from_pretrained(path)
    with tempfile.TemporaryDirectory() as folder, vtc.compress(model, method, retention=retention, pad_output=True):
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=2,
            learning_rate=1e-4,
            logging_steps=1,
            remove_unused_columns=False,  # the pictures are no argument of the model
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(model, settings, data_collator=Collate(processor), train_dataset=Circles())
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-llava")
    parser.add_argument("--method", default="vtc_cls")
    parser.add_argument("--retention", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    print("losses:", *train(args.model, args.method, args.retention, args.steps))


if __name__ == "__main__":
    main()
