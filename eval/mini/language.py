"""The language model and its tokenizer out of a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from vtc.errors import InputError, one_line

IMAGE = "<image>"
SPARE = "<empty_output>"
"""A special token that chats never contain; the placeholder of pictures takes its place, so that no row is added."""
END = "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML with pictures in front of the text, and without the system prompt that SmolLM2's own template puts in."""


def load_language(path: Path) -> tuple[Any, Any]:
    """LlamaForCausalLM in float32 and its tokenizer; raises InputError for a file that holds no Llama."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"{path} cannot be read as a GGUF model: {one_line(error)}") from error
    plain = read.config.to_dict()
    if plain["model_type"] != "llama":
        raise InputError(f"{path} holds a model of type {plain['model_type']!r}; a Llama is needed")
    for name in ("quantization_config", "_name_or_path", "transformers_version"):  # would make it refuse other types
        plain.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**plain))
    model.load_state_dict(read.state_dict())
    return model.eval(), with_image_token(tokenizer)


def with_image_token(tokenizer: Any) -> Any:
    """The tokenizer with `IMAGE` in place of `SPARE`, padding on the left; raises InputError where it has none."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    core = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = core["model"]["vocab"]
    if SPARE not in vocabulary:
        raise InputError(f"the tokenizer has no token {SPARE!r} that pictures could be written with")
    core["model"]["vocab"] = {IMAGE if name == SPARE else name: index for name, index in vocabulary.items()}
    for token in core["added_tokens"]:
        if token["content"] == SPARE:
            token["content"] = IMAGE
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(core)),
        bos_token=tokenizer.bos_token,
        eos_token=END,
        pad_token=END,
        unk_token=tokenizer.unk_token,
        padding_side="left",
        model_max_length=8192,
        model_specific_special_tokens={"image_token": IMAGE},
    )
