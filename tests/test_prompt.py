"""What a method may look at: only the prompt, and of its text only what is not the system prompt."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import vtc
from vtc.app.template import system_length, system_lengths
from vtc.batch.prompt import Prompt, system_rows, unanswered
from vtc.engine.entry import control_tokens
from vtc.errors import InputError, UnsupportedCall
from vtc.method.base import Compressor, StageView
from vtc.testing import snapshot, tiny_inputs, tiny_model
from vtc.testing.contract import with_fresh_weights
from vtc.testing.measures import only_the_prompt

READERS = (
    "fastv", "pyramiddrop", "atp_training_free", "mustdrop", "aim", "todre", "cdpruner", "dart", "sparsevlm",
    "framefusion", "holitom", "flashvid", "vscan", "snapkv", "h2o", "vlcache",
)  # fmt: skip
"""Methods that look at the question or at the attention of the whole prompt."""
LOOK: list[list[Any]] = [[4, "image", 3, "image", 5], [2, "image", 12], [9]]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10, "min_new_tokens": 10}


@dataclass(frozen=True)
class Looks(Compressor):
    """Keeps everything and notes what it is shown."""

    views: ClassVar[list[StageView]] = []
    name: ClassVar[str] = "looks"

    def keeps_all(self, budget: Any, tokens: int) -> bool:
        return False

    @property
    def needs_budget(self) -> bool:
        return False

    def select(self, view: StageView) -> None:
        self.views.append(view)


@torch.no_grad()
def shown(model: Any, inputs: dict[str, Tensor], **options: Any) -> StageView:
    """The view at the stage before the LLM."""
    Looks.views.clear()
    with vtc.compress(model, Looks(), **options):
        model(**inputs)
    return Looks.views[0]


# --- answers
@pytest.mark.parametrize("name", ["llava-clip", "qwen2.5-vl", "internvl"])
@pytest.mark.parametrize("method", READERS)
def test_an_answer_behind_the_prompt_changes_nothing(name: str, method: str) -> None:
    model = tiny_model(name)
    for layout in (LOOK, [[6, "image", 7]]):
        inputs = tiny_inputs(name, layout, seed=3, extra=1, model=model)
        attach = lambda model, **more: vtc.compress(model, method, retention=0.7, **more)  # noqa: E731
        assert only_the_prompt(model, inputs, attach) == 0.0


@pytest.mark.parametrize("name", ["llava-clip", "llava-onevision", "qwen3-vl"])
@pytest.mark.parametrize("method", READERS)
@pytest.mark.parametrize("draft", ["model", "lookup"])
def test_drafts_do_not_count(name: str, method: str, draft: str) -> None:
    """Assisted decoding gives the greedy answer and keeps the same tokens."""
    model, inputs = tiny_model(name), tiny_inputs(name, [[4, "image", 9]], seed=1)
    inputs["input_ids"][0, -9:] = 7 + torch.arange(9) % 3  # repeats itself, so that lookup finds drafts
    helper = {"assistant_model": tiny_model(name, layers=2, seed=5)} if draft == "model" else {
        "prompt_lookup_num_tokens": 3
    }  # fmt: skip
    settings = {**GREEDY, "suppress_tokens": [0, 120, 121, 122, 123]}
    answers, kept = [], []
    for more in ({}, helper):
        with vtc.compress(model, method, retention=0.7) as handle:
            answers.append(model.generate(**inputs, **settings, **more))
        kept.append({stage: tokens.tolist() for stage, tokens in handle.trace[0].items[0].kept.items()})
    assert torch.equal(*answers)
    assert kept[0] == kept[1]


def test_learned_methods_train_on_the_prompt_alone() -> None:
    """Teacher forcing shows an ATP module the scores that it will see when it answers."""
    model = tiny_model("llava-clip")
    method = with_fresh_weights(vtc.create("atp"), vtc.adapters.of(model).spec)
    inputs = tiny_inputs("llava-clip", LOOK, seed=3, extra=1, model=model)
    assert only_the_prompt(model, inputs, lambda model, **more: vtc.compress(model, method, **more)) == 0.0


def test_what_ends_a_prompt() -> None:
    visual = torch.tensor([[0, 1, 0, 0, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0]]).bool()
    answer = torch.tensor([[0, 0, 0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1, 0, 1]]).bool()
    # Of a dialogue the answer between the images is left out, and all from the first answer behind them on.
    assert unanswered(visual, answer).int().tolist() == [[1, 1, 1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]]
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1], [1] * 8])
    find = lambda **bounds: Prompt.find(  # noqa: E731
        visual, None, mask, None, None, vtc.batch.prompt.Bounds(**bounds)
    )
    assert find(prompt_length=[4, 6]).rows.int().tolist() == [[0, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0]]
    assert find(prompt_length=6, system_length=2).text.int().tolist() == [
        [0, 0, 0, 1, 0, 1, 1, 0],
        [0, 0, 0, 1, 1, 1, 0, 0],
    ]


@pytest.mark.parametrize("padding", ["left", "right"])
def test_prompt_length_counts_no_padding_and_follows_beams(padding: Any) -> None:
    model = tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", LOOK, seed=3, padding=padding, extra=2)
    lengths = inputs["attention_mask"].sum(1)
    view = shown(model, inputs, prompt_length=lengths - 2)
    assert view.prompt.sum(1).tolist() == (lengths - 2).tolist()
    assert not (view.prompt & ~view.valid).any()
    Looks.views.clear()
    with vtc.compress(model, Looks(), prompt_length=(lengths - 2).tolist(), system_length=[1, 2, 3]):
        model.generate(**inputs, max_new_tokens=2, num_beams=2, do_sample=False)
    expected = (lengths - 2).repeat_interleave(2)
    assert Looks.views[0].prompt.sum(1).tolist() == expected.tolist()
    visual = Looks.views[0].visual.sum(1)
    assert Looks.views[0].text.sum(1).tolist() == (expected - visual - torch.tensor([1, 1, 2, 2, 3, 3])).tolist()


def test_prompt_lengths_that_cannot_be_meant() -> None:
    model = tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", LOOK, seed=3)
    before = snapshot(model)
    for given in (0, -3, 1.5, True, "9", [], [4, 0], [[4]], float("nan")):
        with pytest.raises(InputError, match=r"prompt_length=.* is no number of tokens; pass a whole number"):
            vtc.compress(model, "random", retention=0.5, prompt_length=given)
    with pytest.raises(InputError, match="system_length=-1"):
        vtc.compress(model, "random", retention=0.5, system_length=-1)
    assert snapshot(model) == before
    with vtc.compress(model, "fastv", retention=0.7) as handle, torch.no_grad():
        handle.prompt_length = [9, 9]
        with pytest.raises(UnsupportedCall, match="prompt_length has 2 entries for a batch of 3 rows"):
            model(**inputs)
        handle.prompt_length = 6  # ends inside the images
        with pytest.raises(UnsupportedCall, match="visual tokens of a row lie outside the prompt"):
            model(**inputs)
        handle.prompt_length = None
        model(**inputs)
    assert (handle.prompt_length, handle.system_length) == (None, None)


def test_generate_is_watched_per_thread_and_given_back(clip: Any) -> None:
    """One thread's generate() says nothing about another's forward pass, and the instance gets its own method back."""
    inputs = tiny_inputs("llava-clip", [[4, "image", 9]], seed=1)
    own = clip.generate
    clip.generate = lambda *args, **kwargs: own(*args, **kwargs)
    mine = clip.generate
    inside, done = threading.Event(), threading.Event()

    def wait(*_: Any) -> bool:
        inside.set()
        return not done.wait(20)

    seen: dict[str, Any] = {}
    Looks.views.clear()
    with vtc.compress(clip, Looks()) as handle, torch.no_grad():
        watch = handle._engine.entry.watch
        work: Callable[[], Any] = lambda: clip.generate(  # noqa: E731
            **inputs, max_new_tokens=2, stopping_criteria=[wait]
        )
        thread = threading.Thread(target=work)
        thread.start()
        assert inside.wait(20)
        seen["here"] = watch.limit(0)
        longer = {**inputs, "input_ids": inputs["input_ids"].repeat(1, 1)}
        clip(**longer)
        done.set()
        thread.join()
        with pytest.raises(ValueError, match="no_such_option"):
            clip.generate(**inputs, no_such_option=1)
        assert watch.limit(0) is None
    assert seen["here"] is None
    assert clip.generate is mine


# --- text
def test_text_in_front_of_the_picture_is_text() -> None:
    model = tiny_model("llava-clip")
    view = shown(model, tiny_inputs("llava-clip", [[9, "image", 2], [4, "image", 1, "image", 3], [5]], seed=2))
    assert view.text.sum(1).tolist() == [11, 8, 5]
    assert not (view.text & view.visual).any()


def test_the_system_prompt_is_no_text() -> None:
    """It ends with the last control token in front of the first visual token, or where the caller says."""
    model = tiny_model("llava-clip")
    (begin,) = control_tokens(model)
    inputs = tiny_inputs("llava-clip", [[9, "image", 4, "image", 3]], seed=2)
    inputs["input_ids"][0, [0, 5, -1]] = begin
    assert shown(model, inputs).text.sum() == 3 + 4 + 3
    assert shown(model, inputs, system_length=0).text.sum() == 9 + 4 + 3
    assert shown(model, inputs, system_length=8).text.sum() == 1 + 4 + 3
    embeds = {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach()}
    del embeds["input_ids"]
    assert shown(model, embeds).text.sum() == 3 + 4 + 3
    visual, control = torch.tensor([[0, 0, 0, 1, 0], [0, 0, 0, 0, 0]]).bool(), torch.ones(2, 5).bool()
    assert system_rows(visual, control).int().tolist() == [[1, 1, 1, 0, 0], [0] * 5]


def test_todre_keeps_the_picture_that_a_question_precedes() -> None:
    """A row whose question stands in front of its image parts by what the image pays to the question."""
    model = tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", [[12, "image", 1]], seed=2)
    with torch.no_grad():
        with vtc.compress(model, "todre", retention=0.5) as handle:
            model(**inputs)
        kept = handle.trace[0].items[0].kept
        assert len(kept[0]) == len(kept[max(kept)]) == 8
        # Told that all of it is system prompt, what is left of the text pays the image nothing worth keeping it for.
        with vtc.compress(model, "todre", retention=0.5, tau=1.0, system_length=12) as handle:
            model(**inputs)
        kept = handle.trace[0].items[0].kept
        assert (len(kept[0]), len(kept[max(kept)])) == (8, 0)


def test_cdpruner_reads_a_question_in_front() -> None:
    model = tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", [[12, "image", 1]], seed=2)
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, :12] = torch.randint(5, 110, (12,), generator=torch.Generator().manual_seed(9))
    kept = []
    for asked in (inputs, other):
        with torch.no_grad(), vtc.compress(model, "cdpruner", keep=5) as handle:
            model(**asked)
        kept.append(handle.trace[0].items[0].kept[0].tolist())
    assert kept[0] != kept[1]


def test_the_length_of_a_template_s_head() -> None:
    """What stands in front of the user's words: the same in every prompt of that template."""
    from vtc.app.loading import load

    processor = load("tiny-llava").processor
    length = system_length(processor)
    words = processor.tokenizer(
        processor.apply_chat_template([{"role": "user", "content": "what color"}], tokenize=False)
    )["input_ids"]
    head = processor.tokenizer.convert_ids_to_tokens(words)[:length]
    assert "".join(head).endswith("USER:")
    assert "what" not in head
    told = [{"role": "system", "content": [{"type": "text", "text": "answer briefly"}]}]
    assert system_length(processor, told) > length
    asked = [{"role": "user", "content": "what color"}]
    written, write = [], processor.apply_chat_template
    processor.apply_chat_template = lambda *given, **more: written.append(given) or write(*given, **more)
    conversations = [asked, [*told, *asked], asked, [*told, *asked], asked]
    expected = (length, system_length(processor, told)) * 2 + (length,)
    written.clear()
    assert system_lengths(processor, conversations) == expected
    assert len(written) == 4  # two for each of two heads
    processor.chat_template = None
    assert system_length(processor) == 0
