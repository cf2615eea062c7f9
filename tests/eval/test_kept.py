"""Kept tokens that a sweep records are those of `vtc.compress` on the same document, however it ran."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vtc
from vtc.app import loading
from vtc.app.media import Video
from vtc.app.preparation import Chat
from vtc.app.show.geometry import acting
from vtc.app.show.paint import owners
from vtc.batch.places import places
from vtc.errors import InputError
from vtc.eval.cells import make_cells
from vtc.eval.generation import make_generation
from vtc.eval.kept import kept_records, read_kept, recorded
from vtc.eval.runner import Runner
from vtc.eval.samples import read_samples, write_samples
from vtc.eval.spec import make_spec
from vtc.eval.store import Store, Writer
from vtc.eval.sweep import SweepResult, run_sweep

METHODS = ["random", "vtc_cls", "fastv(layer=1)", "tome", "h2o", "vtc_cls@0.5+fastv(layer=1)@0.6"]


@pytest.fixture
def sweep(model_folder: Path, task_folder: Path, tmp_path: Path) -> Callable[..., SweepResult]:
    """A function that sweeps `blobs` into a folder of `tmp_path`."""

    def run(out: str = "out", **settings: Any) -> SweepResult:
        given = {"model": str(model_folder), "tasks": ["blobs"], "include_path": [task_folder], "device": "cpu"}
        given |= {"methods": METHODS, "retentions": [0.6], "batch_size": 4, "out": tmp_path / out}
        return run_sweep(make_spec(given | settings))

    return run


def kept(folder: Path) -> dict[Any, Any]:
    """All records by task, cell and document."""
    found = list(Store(folder).kept())
    by_key = {(each["task"], each["cell"], each["doc_id"]): each for each in found}
    assert len(by_key) == len(found)
    return by_key


def direct(runner: Runner, chat: Chat, method: Any, **budget: Any) -> Iterator[list[Any]]:
    """Number of tokens, and bits of every panel, of each item of one prompt under `vtc.compress`."""
    batch = runner.prepare([chat])
    told = {"system_length": batch.system_lengths, "image_sizes": batch.image_sizes, "questions": batch.questions}
    with vtc.compress(runner.model, method, processor=runner.processor, trace=True, **told, **budget) as handle:
        with torch.inference_mode():
            runner.model.generate(**batch.inputs, max_new_tokens=2, do_sample=False)
        items = handle.trace[0].items
    stage = list(acting(items))[-1]
    for item in items:
        found, alive = places(item.layout), item.passed[stage].numpy()
        sizes = item.layout.regions if item.layout.kind != "video" else item.layout.regions * len(found.panels)
        rasters = [owners(found, number, *sizes[number][1:]) for number in range(len(found.panels))]
        yield [int(alive.sum()), [(alive[raster] & (raster >= 0)).ravel().tolist() for raster in rasters]]


def drawn(record: Any) -> list[list[list[bool]]]:
    """Bits of every panel of every item."""
    return [[bits(rows, columns, text) for _, rows, columns, text in item["panels"]] for item in record["items"]]


def bits(rows: int, columns: int, text: str) -> list[bool]:
    packed = np.frombuffer(base64.b64decode(text), np.uint8)
    return np.unpackbits(packed)[: rows * columns].astype(bool).tolist()


def test_a_sweep_records_what_compress_keeps(sweep: Callable[..., SweepResult], runner: Runner, blobs: Any) -> None:
    result = sweep()
    assert not result.failures
    records, cells = kept(result.folder), Store(result.folder).cells()
    spec = make_spec({"methods": METHODS, "retentions": [0.6]})
    methods = {cell.key(): cell for cell in map(runner.check, make_cells(spec, runner.loaded.fingerprint()))}
    stages = {}
    for key, cell in cells.items():
        if cell["label"] == "none":
            assert not any(each[1] == key for each in records)
            continue
        method = methods[key]
        budget = {"retention": 0.6} if "+" not in method.label else {}
        for doc_id in range(10):
            record = records.pop(("blobs", key, doc_id))
            ((left, panels),) = direct(runner, blobs.conversation(doc_id), method.compressor, **budget)
            assert (record["left"], record["of"]) == (left, 144) and drawn(record) == [panels], method.label
            stages[cell["label"].split("(")[0]] = record["stage"], record["items"][0]["window"]
    assert not records
    assert {name: stage for name, (stage, _) in stages.items()} == {
        "random": "before the LLM", "vtc_cls": "before the LLM", "fastv": "before layer 1", "tome": "before the LLM",
        "h2o": "caches from layer 1 on", "vtc_cls@0.5+fastv": "before layer 1",
    }  # fmt: skip
    assert {tuple(window) for _, window in stages.values()} == {(0.125, 0.0, 0.875, 1.0)}  # the centre of 120 x 90


def test_batches_workers_and_interruptions_change_nothing(
    sweep: Callable[..., SweepResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"methods": ["vtc_cls", "fastv(layer=1)"]}
    whole = kept(sweep("whole", **settings).folder)
    assert len(whole) == 20
    assert kept(sweep("one by one", **settings, batch_size=1).folder) == whole
    assert kept(sweep("workers", **settings, workers=2).folder) == whole
    sweep("grown", methods=["vtc_cls"], limit=3)
    assert kept(sweep("grown", **settings).folder) == whole

    def interrupted(*_: Any) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Writer, "add_rows", interrupted)
        sweep("killed", **settings)
    folder = sweep("killed", **settings).folder  # what was kept had been written, its answers had not
    again = {(each["task"], each["cell"], each["doc_id"]): each for each in Store(folder).kept()}
    assert again == whole


def test_answers_do_not_depend_on_the_record(
    sweep: Callable[..., SweepResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(result: SweepResult) -> list[Any]:
        return [{k: v for k, v in row.items() if "seconds" not in k} for row in Store(result.folder).rows()]

    with_record = rows(sweep("with"))
    monkeypatch.setattr("vtc.eval.answering.recorded", lambda doc_id: False)
    without = sweep("without")
    assert rows(without) == with_record and kept(without.folder) == {}
    assert [sample["kept"] for sample in browser(without)["samples"]] == [[None] * 7] * 10


def browser(result: SweepResult) -> Any:
    """What the report of a sweep embeds."""
    text = (result.folder / "report.html").read_text()
    data = text.split('<script type="application/json" id="samples-data">')[1].split("</script>")[0]
    return json.loads(data)["blobs"]


def test_the_report_holds_them(sweep: Callable[..., SweepResult]) -> None:
    result = sweep(methods=["vtc_cls", "stride"])
    shown, records = browser(result), kept(result.folder)
    keys = list(Store(result.folder).cells())
    assert len(shown["samples"]) == 10
    for sample in shown["samples"]:
        assert sample["kept"][0] is None  # the untouched model
        for key, said in zip(keys[1:], sample["kept"][1:], strict=True):
            record = records["blobs", key, sample["doc_id"]]
            ((name, *raster),) = record["items"][0]["panels"]
            assert said["panels"] == [[0, name, record["items"][0]["window"], *raster]] and name == "picture"
            assert (said["stage"], said["left"], said["of"]) == ("before the LLM", 86, 144)


def test_tiles_videos_and_several_pictures(video_model_folder: Path) -> None:
    runner = Runner(loading.load(str(video_model_folder), device="cpu"))
    noise = np.random.default_rng(0).integers(0, 256, (10, 90, 60, 3), dtype=np.uint8)
    picture, other = Image.fromarray(noise[0]), Image.fromarray(noise[1]).resize((80, 40))
    clip = Video(noise[2:], np.arange(8) / 2, 2.0, 8)
    contents = [
        [{"type": "image", "image": picture}],
        [{"type": "image", "image": picture}, {"type": "image", "image": other}],
        [{"type": "video", "video": clip}],
        [{"type": "text", "text": "no picture"}],
    ]
    question = {"type": "text", "text": "where is it?"}
    chats = [Chat([{"role": "user", "content": [*content, question]}]) for content in contents]
    cells = [runner.check(cell) for cell in make_cells(make_spec({"methods": ["random"], "retentions": [0.4]}), {})]
    numbers = {0: chats[0], 1: chats[1], 2: chats[3]}
    for together in (numbers, {3: chats[2]}):
        for beams in (1, 2):
            trace: list[Any] = []
            generation = make_generation({"max_new_tokens": 2, "num_beams": beams}, source="test")
            runner.answer(runner.prepare(list(together.values())), cells[1], generation, trace=trace)
            found = {each["doc_id"]: each for each in kept_records(trace[0], together, runner.processor)}
            assert set(found) == set(together) - {2}
            for doc_id, record in found.items():
                expected = list(direct(runner, together[doc_id], "random", retention=0.4))
                assert drawn(record) == [panels for _, panels in expected]
                assert record["left"] == sum(left for left, _ in expected)
                assert [item["media"] for item in record["items"]] == list(range(len(expected)))


def test_a_frame_has_the_panel_it_is_part_of(tmp_path: Path) -> None:
    panels = [[f"frame {number + 1}", 1, 1, "gA=="] for number in range(4)]
    items = [
        {"media": 1, "kind": "video", "window": [0, 0, 1, 1], "panels": panels},
        {"media": 0, "kind": "image", "window": [0, 0, 1, 1], "panels": [["overview", 1, 1, ""], ["tiles", 1, 1, ""]]},
    ]
    record = {"cell": "c", "task": "t", "task_fp": "f", "stage": "s", "left": 4, "of": 9, "items": items}
    with Store(tmp_path).writing() as writer:
        writer.save_run({"model": {}, "tasks": {}, "sweeps": []})
        writer.add_kept([{**record, "doc_id": doc_id} for doc_id in (0, 1)])
    shown = [(0, 0, 1), (1, 0, 8), (1, 3, 8), (1, 7, 8)]
    found = read_kept(Store(tmp_path), {("t", "f", 1): shown, ("t", "f", 2): shown})
    assert found["t", "f", 2] == {}
    names = [(picture, name) for picture, name, *_ in found["t", "f", 1]["c"]["panels"]]
    assert names == [(0, "overview"), (0, "tiles"), (1, "frame 1"), (2, "frame 2"), (3, "frame 4")]
    with pytest.raises(InputError, match=r"kept\.jsonl: a line is damaged .*; remove the file and go on"):
        read_kept(Store(tmp_path), {("t", "f", 1): [(2, 0, 1)]})


def test_what_is_stored_already_is_not_written_again(tmp_path: Path) -> None:
    where = {"cell": "c", "task": "t", "task_fp": "f", "doc_id": 0}
    record = {**where, "stage": "s", "left": 1, "of": 2, "items": []}
    with Store(tmp_path).writing() as writer:
        writer.save_run({"model": {}, "tasks": {}, "sweeps": []})
        for _ in range(2):
            writer.add_kept([record])
            writer.add_rows([{**where, "repeat": 0, "text": ""}])
    assert list(Store(tmp_path).kept()) == [record]


def test_samples_are_documents_that_are_recorded(blobs: Any, tmp_path: Path, write_store: Any) -> None:
    chosen = [doc_id for doc_id in range(100) if recorded(doc_id)]
    assert chosen == [*range(32), *range(32, 64, 2), *range(64, 100, 4)]
    scores = [[1.0] * 100, [0.0 if doc_id in (9, 33, 35) else 1.0 for doc_id in range(100)]]
    write_store(tmp_path, [("none", 1.0), ("a", 0.5)], {"blobs": scores}, fingerprint=blobs.fingerprint)
    write_samples(Store(tmp_path), [blobs])
    samples = read_samples(tmp_path, "blobs", blobs.fingerprint)
    assert samples[0]["doc_id"] == 9 and not {33, 35} & {sample["doc_id"] for sample in samples}
