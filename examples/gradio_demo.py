"""A demo in the browser: a picture, a question, a method, and the answers of the whole and of the short prompt.

pip install gradio
python examples/gradio_demo.py --model tiny-llava
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtc
from vtc.embedded import NAMES, model_path

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Demo:
    """One model, asked with and without a method."""

    def __init__(self, model: str) -> None:
        path = model_path(model) if model in NAMES else model
        self.processor = AutoProcessor.from_pretrained(path)
        self.model = AutoModelForImageTextToText.from_pretrained(path).to(DEVICE).eval()

    def answer(self, picture: Image.Image | None, question: str, method: str, retention: float) -> tuple[str, str, str]:
        """Answer of the untouched model, answer under the method, and what was kept; a refusal in its place."""
        if picture is None:
            return "", "", "choose a picture first"
        content = [{"type": "image", "image": picture.convert("RGB")}, {"type": "text", "text": question}]
        how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = self.processor.apply_chat_template([{"role": "user", "content": content}], **how).to(DEVICE)
        whole = self._generate(inputs)
        try:
            with vtc.compress(self.model, method, retention=retention) as handle:
                short = self._generate(inputs)
        except vtc.VTCError as error:
            return whole, "", str(error)
        return whole, short, f"{handle.stats.retention:.1%} of the visual tokens, mean over the layers"

    @torch.inference_mode()
    def _generate(self, inputs: Any) -> str:
        output = self.model.generate(**inputs, max_new_tokens=16, do_sample=False)
        text: str = self.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return text

    def page(self) -> Any:
        """The page; `launch()` serves it."""
        import gradio as gr

        untrained = vtc.list_methods(trained=False)
        return gr.Interface(
            self.answer,
            inputs=[
                gr.Image(type="pil", label="picture"),
                gr.Textbox("What color is the circle?", label="question"),
                gr.Dropdown(untrained, value="vtc_cls", label="method"),
                gr.Slider(0.02, 1.0, value=0.25, label="retention"),
            ],
            outputs=[gr.Textbox(label="untouched"), gr.Textbox(label="compressed"), gr.Textbox(label="kept")],
            title="vtc",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-llava")
    Demo(parser.parse_args().model).page().launch()


if __name__ == "__main__":
    main()
