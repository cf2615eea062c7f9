"""The path of a prompt: the same answers however they are batched, shared and repeated."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import vtc
from vtc.app import answer as answering
from vtc.app import preparation
from vtc.app.answer import answer
from vtc.app.preparation import Chat
from vtc.errors import InputError, UnsupportedModel
from vtc.eval.cells import make_cells
from vtc.eval.generation import Generation, make_generation
from vtc.eval.runner import Runner, batch_seed, few_threads
from vtc.eval.spec import make_spec

GREEDY = make_generation({"max_new_tokens": 4}, source="test")
SAMPLED = make_generation({"max_new_tokens": 4, "temperature": 2.0}, source="test")


@pytest.fixture(scope="module")
def cells(runner: Runner) -> list[Any]:
    spec = make_spec({"methods": ["random", "stride", "pool", "vtc_cls"], "retentions": [1.0, 0.25, 0.05]})
    return [runner.check(cell) for cell in make_cells(spec, {})]


@pytest.fixture(scope="module")
def conversations(blobs: Any) -> list[Any]:
    return [blobs.conversation(doc_id) for doc_id in range(6)]


def texts(
    runner: Runner, conversations: list[Any], cell: Any, generation: Generation = GREEDY, seed: int = 0
) -> list[str]:
    return [answer.text for answer in runner.answer(runner.prepare(conversations), cell, generation, seed=seed)]


def test_prompts_are_padded_on_the_left(runner: Runner, conversations: list[Any]) -> None:
    batch = runner.prepare(conversations[:2])
    mask = batch.inputs["attention_mask"]
    assert mask.sum(1).unique().numel() == 2
    assert (mask.diff(dim=1) >= 0).all()
    assert batch.visual_tokens == (144, 144)
    begin = runner.processor.tokenizer.bos_token_id
    assert (batch.inputs["input_ids"] == begin).sum(1).tolist() == [1, 1]


def test_answers_do_not_depend_on_the_batch(runner: Runner, conversations: list[Any], cells: list[Any]) -> None:
    seen = set()
    for cell in cells:
        together = texts(runner, conversations, cell)
        assert together == [texts(runner, [one], cell)[0] for one in conversations]
        assert together == texts(runner, conversations[:2], cell) + texts(runner, conversations[2:], cell)
        seen |= set(together)
    assert len(seen) > 5


def test_sharing_the_encoder_changes_no_answer_and_encodes_once(
    runner: Runner, conversations: list[Any], cells: list[Any]
) -> None:
    alone = [texts(runner, conversations, cell) for cell in cells]
    passes = []
    tower = runner.model.model.vision_tower
    hook = tower.register_forward_hook(lambda *_: passes.append(1))
    batch = runner.prepare(conversations)
    with runner.sharing(cells):
        shared = [[answer.text for answer in runner.answer(batch, cell, GREEDY)] for cell in cells]
    hook.remove()
    assert shared == alone
    assert len(passes) == 1


def test_an_answer_says_what_it_cost(runner: Runner, conversations: list[Any], cells: list[Any]) -> None:
    baseline, *_, quarter = [c for c in cells if c.is_baseline or (c.method, c.retention) == ("stride", 0.25)]
    batch = runner.prepare(conversations)
    whole, kept = runner.answer(batch, baseline, GREEDY)[0], runner.answer(batch, quarter, GREEDY)[0]
    assert (whole.visual_tokens_in, whole.visual_tokens_kept, whole.engine_seconds) == (144, 144, 0.0)
    assert (kept.visual_tokens_in, kept.visual_tokens_kept) == (144, 36.0)
    assert kept.input_tokens == whole.input_tokens == int(batch.inputs["attention_mask"][0].sum())
    assert 1 <= whole.output_tokens <= 4 and whole.seconds > 0 and kept.engine_seconds > 0


def test_an_answers_length_ends_with_its_end_token(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    new = torch.tensor([[5, 3, 0, 0], [5, 6, 7, 8], [3, 3, 3, 3], [0, 0, 9, 3]])
    configuration = runner.model.generation_config
    for ends, lengths in ((3, [2, 4, 1, 4]), ([9, 3], [2, 4, 1, 3]), (None, [4, 4, 4, 4])):
        monkeypatch.setattr(configuration, "eos_token_id", ends)
        assert runner._lengths(new) == lengths


def test_a_batch_that_does_not_fit_says_what_to_change(
    runner: Runner, conversations: list[Any], cells: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(model: Any, **inputs: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory, tried 2 GiB")

    monkeypatch.setattr(type(runner.model), "generate", full)
    with pytest.raises(InputError, match=r"device 'cpu' has not enough memory .*give fewer .*a smaller batch"):
        runner.answer(runner.prepare(conversations[:1]), cells[-1], GREEDY)


def test_prompts_without_a_picture_are_answered_beside_others(
    runner: Runner, conversations: list[Any], cells: list[Any]
) -> None:
    text = [{"role": "user", "content": [{"type": "text", "text": "How many red objects are there?"}]}]
    for cell in (cells[0], cells[-1]):
        answers = runner.answer(runner.prepare([conversations[0], text]), cell, GREEDY)
        assert [answer.text for answer in answers] == texts(runner, conversations[:1], cell) + texts(
            runner, [text], cell
        )
        assert (answers[1].visual_tokens_in, answers[1].visual_tokens_kept) == (0, 0.0)


def test_several_pictures_in_one_prompt(runner: Runner, cells: list[Any]) -> None:
    pictures = [{"type": "image", "image": Image.new("RGB", (80, 60), colour)} for colour in ("red", "blue")]
    prompt = [{"role": "user", "content": [*pictures, {"type": "text", "text": "What color is the ring?"}]}]
    answer = runner.answer(runner.prepare([prompt]), cells[-1], GREEDY)[0]
    assert answer.visual_tokens_in == 288
    assert answer.visual_tokens_kept == 2 * vtc.tokens_to_keep(144, 0.05)


def test_sampling_follows_its_seed_and_leaves_the_global_generator_alone(
    runner: Runner, conversations: list[Any], cells: list[Any]
) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = texts(runner, conversations, cells[0], SAMPLED, seed=1)
    assert first == texts(runner, conversations, cells[0], SAMPLED, seed=1)
    assert first != texts(runner, conversations, cells[0], SAMPLED, seed=2)
    assert torch.equal(state, torch.get_rng_state())
    assert batch_seed(0, "t", 0, 0) != batch_seed(0, "t", 0, 1)


def test_beams_give_one_answer_per_prompt(runner: Runner, conversations: list[Any], cells: list[Any]) -> None:
    beams = make_generation({"max_new_tokens": 3, "num_beams": 2}, source="test")
    answers = runner.answer(runner.prepare(conversations[:3]), cells[-1], beams)
    assert len(answers) == 3
    assert {answer.visual_tokens_kept for answer in answers} == {float(vtc.tokens_to_keep(144, 0.05))}


def test_a_small_model_gets_one_thread_and_the_setting_comes_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with few_threads(torch.nn.Linear(2, 2)):
            assert torch.get_num_threads() == 1
        brought = torch.nn.Linear(2, 2, device="meta")
        brought._hf_hook = SimpleNamespace(execution_device="cpu")  # type: ignore[assignment]
        with few_threads(brought):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_model_without_chat_template_is_refused() -> None:
    loaded = SimpleNamespace(name="old", model=None, processor=SimpleNamespace(chat_template=None))
    with pytest.raises(UnsupportedModel, match="'old' has no chat template"):
        Runner(loaded)


def test_a_batch_names_the_question_that_the_processor_refuses(runner: Runner, conversations: list[Any]) -> None:
    bad = [{"role": "user", "content": [{"type": "text", "text": "what is <image>?"}]}]
    with pytest.raises(InputError, match="prompt 2 holds '<image>'"):
        runner.prepare([conversations[0], bad])
    named = Chat(bad, "task 'x', document 7")
    with pytest.raises(InputError, match="task 'x', document 7 holds '<image>'"):
        runner.prepare([conversations[0], named])


def test_a_sweep_and_generate_show_the_same(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both end in one call of the model with the same inputs."""
    picture = Image.effect_noise((90, 60), 60).convert("RGB")
    picture.getexif()[0x0112] = 6
    question = "What color is the ring?"
    given: list[dict[str, Any]] = []
    generate = type(runner.model).generate

    def record(model: Any, **inputs: Any) -> Any:
        given.append(inputs)
        return generate(model, **inputs)

    monkeypatch.setattr(type(runner.model), "generate", record)
    answer(runner.loaded, [picture], question, max_new_tokens=2)
    prompt = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]
    runner.generate(runner.prepare([prompt]), GREEDY.arguments)
    upright = picture.transpose(Image.Transpose.ROTATE_270)
    upright.getexif()[0x0112] = 1
    answer(runner.loaded, [upright], question, max_new_tokens=2)
    for name in ("input_ids", "attention_mask", "pixel_values"):
        assert all(torch.equal(given[0][name], other[name]) for other in given[1:]), name


def test_the_head_of_the_template_is_no_question(runner: Any, blobs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods read the words of the user alone, system messages and role words left out."""
    told_first = {"role": "system", "content": [{"type": "text", "text": "answer briefly"}]}
    batch = runner.prepare([blobs.conversation(0), [told_first, *blobs.conversation(1)]])
    short, long = batch.system_lengths
    assert 0 < short < long
    told = []
    original = vtc.compress

    def compress(*args: Any, **kwargs: Any) -> Any:
        handle = original(*args, **kwargs)
        told.append(handle)
        return handle

    monkeypatch.setattr("vtc.app.answer.compress", compress)
    (cell,) = [c for c in make_cells(make_spec({"methods": ["random"], "retentions": [0.5]}), {}) if c.compressor]
    runner.answer(batch, cell, make_generation({"max_new_tokens": 1}, source="test"))
    assert told[-1].system_length == (short, long)


def test_the_processor_serves_one_thread_at_a_time(
    runner: Runner, conversations: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer that pads in one thread and decodes in another fails now and then: each waits for the other."""
    free: list[bool] = []

    def watched(call: Any) -> Any:
        def run(*given: Any, **more: Any) -> Any:
            with ThreadPoolExecutor(1) as pool:
                free.append(pool.submit(runner.loaded.processing.acquire, timeout=0.01).result())
            return call(*given, **more)

        return run

    monkeypatch.setattr(preparation, "_process", watched(preparation._process))
    monkeypatch.setattr(answering, "system_lengths", watched(answering.system_lengths))
    monkeypatch.setattr(type(runner.processor), "batch_decode", watched(type(runner.processor).batch_decode))
    runner.generate(runner.prepare(conversations[:1]), GREEDY.arguments)
    assert free == [False] * 3
