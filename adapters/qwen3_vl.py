"""Qwen3-VL, dense and with experts: features of inner encoder layers are also added to the first LLM layers' rows."""

from __future__ import annotations

from typing import ClassVar

from vtc.adapters.qwen import QwenVLAdapter
from vtc.errors import UnsupportedModel
from vtc.method.base import ModelSpec


class Qwen3VLAdapter(QwenVLAdapter):
    """Qwen3VLForConditionalGeneration and Qwen3VLMoeForConditionalGeneration.

    model
    ├── visual .blocks[i].attn, .merger, .deepstack_merger_list[j]
    └── language_model .layers[i].self_attn
    lm_head

    Output j of the deepstack mergers is added behind LLM layer j; a token that others were merged into gets the rows
    of its own place. A video's frames are separated by timestamps in the prompt, they are one item all the same.
    Experts are chosen token by token, so that a token's absence changes nothing for the others but what they attend to.
    """

    family = "qwen3-vl"
    model_classes: ClassVar[tuple[str, ...]] = (
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
    )
    references: ClassVar[tuple[ModelSpec, ...]] = (
        ModelSpec(
            "qwen3-vl", 27, 26, False, tuple(range(27)), 36, mrope=True, encoder_stages=True, packed=True, joins=True
        ),  # Qwen3-VL-8B
    )

    @property
    def deepstack(self) -> bool:
        return bool(self.model.config.vision_config.deepstack_visual_indexes)

    def check(self) -> None:
        """Refuse models without an LLM layer behind the last deepstack rows, and what the base class refuses."""
        super().check()
        rows = len(self.model.config.vision_config.deepstack_visual_indexes)
        layers = self.model.config.text_config.num_hidden_layers
        if rows >= layers:
            raise UnsupportedModel(
                f"this {self.family} model adds visual rows behind each of its {layers} LLM layers ({rows} sets); at "
                "least one layer has to follow the last of them"
            )
