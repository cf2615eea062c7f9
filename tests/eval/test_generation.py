"""Generation settings: from lmms-eval's words to those of transformers."""

from __future__ import annotations

from typing import Any

import pytest

from vtc.errors import InputError
from vtc.eval.generation import Generation, make_generation


def make(**settings: Any) -> Generation:
    return make_generation(settings, source="task 'x'")


def test_greedy_decoding_switches_the_models_own_sampling_off() -> None:
    arguments = make(max_new_tokens=8, temperature=0, do_sample=False, top_p=1.0, num_beams=1).arguments
    assert arguments == {
        "max_new_tokens": 8, "num_beams": 1, "do_sample": False, "temperature": None, "top_p": None, "top_k": None,
    }  # fmt: skip
    assert not make(temperature=0, do_sample=True).samples


def test_a_temperature_means_sampling() -> None:
    generation = make(temperature=0.7, top_k=5)
    assert generation.samples
    assert generation.arguments == {"max_new_tokens": 16, "do_sample": True, "temperature": 0.7, "top_k": 5}
    assert make(do_sample=True).samples


def test_answers_are_cut_at_the_earliest_stop_string() -> None:
    generation = make(until=["\n", "Question"], stop_sequences="###")
    assert generation.until == ("\n", "Question", "###")
    assert generation.cut("red ### Question\n") == "red "
    assert generation.cut("red") == "red"
    assert make(until=None).until == make(until=["", ""]).until == ()


def test_other_words_for_the_length_and_a_setting_of_original_llava() -> None:
    assert make(max_gen_toks=5, image_aspect_ratio="pad").arguments["max_new_tokens"] == 5


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(InputError, match="task 'x': generation setting 'visual_cot' is not supported; known: max_new"):
        make(visual_cot=True)
