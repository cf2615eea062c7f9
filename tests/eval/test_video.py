"""Videos in conversations, sweeps and lmms-eval runs: files, parts of files and lists of frames."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from vtc.app import video_reading
from vtc.app.media import Video, read_video
from vtc.app.video_reading import LIST_RATE, VideoReading, frame_list
from vtc.errors import InputError
from vtc.eval.catalogue import load_tasks
from vtc.eval.messages import Clips, conversation
from vtc.eval.quiet import muted
from vtc.eval.runner import Runner
from vtc.eval.spec import make_spec
from vtc.eval.store import Store
from vtc.eval.sweep import run_sweep

RATE = 10
CODE = """
import os

from PIL import Image

HERE = os.path.dirname(os.path.abspath(__file__))


def doc_to_visual(doc):
    if doc["kind"] == "file":
        return [os.path.join(HERE, "ramp.mp4")]
    if doc["kind"] == "part":
        return [{"type": "video", "path": os.path.join(HERE, "ramp.mp4"), "video_start": 1.0, "video_end": 2.0}]
    frames = [Image.new("RGB", (56, 56), (20 * i, 0, 0)) for i in range(doc["frames"])]
    return [{"type": "video", "url": frames}]


def process_results(doc, results):
    return {"accuracy": {"score": float(len(results[0]) > doc["frames"])}}


def mean(items):
    return sum(item["score"] for item in items) / len(items)
"""
YAML = """
task: clips
dataset_path: json
dataset_kwargs: {data_files: {test: clips.jsonl}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: question
doc_to_target: answer
process_results: !function utils.process_results
generation_kwargs: {max_new_tokens: 3, temperature: 0, do_sample: false}
metric_list:
  - {metric: accuracy, aggregation: !function utils.mean, higher_is_better: true}
"""
DOCUMENTS = (("file", 8), ("list", 4), ("list", 6), ("list", 4), ("part", 8), ("list", 6))


def write_ramp(file: Path, count: int = 30) -> Path:
    """A clip of 10 frames a second whose frame i has the grey value 6 i."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, RATE)
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 6 * number, np.uint8), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file


def greys(video: Video) -> list[int]:
    return np.rint(video.frames.reshape(len(video.frames), -1).mean(1) / 6).astype(int).tolist()


@pytest.fixture(scope="module")
def ramp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ramp(tmp_path_factory.mktemp("clips") / "ramp.mp4")


@pytest.fixture(scope="module")
def clip_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the task `clips`: videos as a file, a part of it, and frame lists of two lengths."""
    folder = tmp_path_factory.mktemp("clips_task")
    write_ramp(folder / "ramp.mp4")
    (folder / "utils.py").write_text(CODE)
    (folder / "clips.yaml").write_text(YAML)
    lines = [
        {"kind": kind, "frames": n, "question": "What color is the ring?", "answer": "red"} for kind, n in DOCUMENTS
    ]
    (folder / "clips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def shown(url: Any, reading: VideoReading | None = None, **times: float) -> Video:
    messages = [{"role": "user", "content": [{"type": "video", "url": url, **times}]}]
    video = conversation(messages, "task 'x', document 3", Clips(reading))[0]["content"][0]["video"]
    assert isinstance(video, Video)
    return video


def test_a_file_becomes_32_frames_at_most_unless_told(ramp: Path) -> None:
    assert greys(shown(str(ramp))) == list(range(30))
    assert greys(shown(str(ramp), VideoReading(frames=4))) == [0, 10, 19, 29]
    few = shown(str(ramp), VideoReading(fps=2.0))
    assert greys(few) == [0, 5, 10, 15, 20, 25] and few.seconds.tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]


def test_a_part_of_a_file_keeps_the_times_of_the_file(ramp: Path) -> None:
    part = shown(str(ramp), VideoReading(frames=3), start_time=1.0, end_time=2.0)
    assert greys(part) == [10, 15, 20] and part.seconds.tolist() == [1.0, 1.5, 2.0]
    by_rate = shown(str(ramp), VideoReading(fps=5.0, frames=64), start_time=2.0)
    assert greys(by_rate) == [20, 22, 24, 26, 28]
    assert greys(read_video(ramp, start=0.55, end=0.95)) == [5, 6, 7, 8, 9]
    whole = shown({"type": "video", "path": str(ramp), "video_start": 1.0, "video_end": 2.0}, VideoReading(frames=3))
    assert np.array_equal(whole.frames, part.frames)
    with pytest.raises(InputError, match=r"document 3: video .* shows nothing from 7 to 8 s; it lasts 3\.0 s"):
        shown(str(ramp), start_time=7.0, end_time=8.0)


def test_a_list_of_frames_is_taken_whole_unless_told() -> None:
    frames = [Image.new("RGB", (8, 6), (6 * i,) * 3) for i in range(40)]
    video = shown(frames)
    assert greys(video) == list(range(40)) and video.fps == LIST_RATE
    assert greys(shown(frames, VideoReading(frames=3))) == [0, 20, 39]
    assert np.array_equal(shown([np.asarray(frame) for frame in frames]).frames, video.frames)
    for wrong, words in (
        ([], "a list of no frames is no video"),
        ([frames[0], Image.new("RGB", (9, 6))], "a list of frames of 8 x 6, 9 x 6 pixels is no video"),
        (3, "a video cannot be of type int"),
    ):
        with pytest.raises(InputError, match=f"task 'x', document 3: {words}"):
            shown(wrong)
    with pytest.raises(InputError, match="a list of frames has no times"):
        shown(frames, start_time=1.0)


def test_large_frames_are_scaled_down_in_proportion(ramp: Path) -> None:
    assert shown(str(ramp), VideoReading(frames=2, max_pixels=768)).frames.shape == (2, 24, 32, 3)
    assert shown(str(ramp), VideoReading(frames=2, max_pixels=5000)).frames.shape == (2, 48, 64, 3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"frames": 0}, "frames=0"),
        ({"sampling": "fps"}, "needs a rate"),
        ({"sampling": "all", "fps": 2}, "leave one of the two out"),
        ({"max_pixels": 0}, "leaves nothing"),
        ({"frame": 8}, r"unknown key 'video\.frame'; did you mean 'video\.frames'"),
        ({"sampling": "uniforme"}, "sampling"),
    ],
)
def test_readings_that_choose_nothing_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make_spec({"video": settings})


def test_texts_pictures_and_videos_stay_in_their_order(ramp: Path) -> None:
    picture = Image.new("RGB", (8, 8), "red")
    content = [
        {"type": "text", "text": "First"},
        {"type": "image", "url": picture},
        {"type": "text", "text": "then"},
        {"type": "video", "url": str(ramp)},
        {"type": "video", "url": str(ramp)},
    ]
    chat = conversation([{"role": "user", "content": content}], "the prompt", clips := Clips(VideoReading(frames=2)))
    found = chat[0]["content"]
    assert [part["type"] for part in found] == ["text", "image", "text", "video", "video"]
    assert found[1]["image"] is picture
    assert found[3]["video"] is found[4]["video"] is clips.video({"video": str(ramp)})


def test_each_video_of_a_batch_is_decoded_once(clip_task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[tuple[Any, Any]] = []
    read = video_reading.read_video

    def noted(path: Any, *args: Any, **kwargs: Any) -> Video:
        decoded.append((Path(path).name, kwargs["start"]))
        return read(path, *args, **kwargs)

    monkeypatch.setattr(video_reading, "read_video", noted)
    (task,) = load_tasks(["clips"], [clip_task])
    clips = Clips()
    for doc_id in (0, 4, 0, 4):
        task.conversation(doc_id, clips)
    assert decoded == [("ramp.mp4", None), ("ramp.mp4", 1.0)]


def test_a_sweep_answers_videos_as_the_runner_does_one_by_one(
    video_model_folder: Path, clip_task: Path, tmp_path: Path
) -> None:
    settings = {
        "model": str(video_model_folder),
        "methods": ["random", "aim"],
        "retentions": [0.5],
        "tasks": ["clips"],
        "include_path": [str(clip_task)],
        "video": {"frames": 6},
        "batch_size": 4,
        "device": "cpu",
        "out": str(tmp_path / "out"),
    }
    result = run_sweep(make_spec(settings))
    assert not result.failures and result.answered == 3 * len(DOCUMENTS)
    (line,) = [line for line in result.results.lines if line["method"] == "none"]
    assert line["n"] == len(DOCUMENTS)
    store = Store(tmp_path / "out")
    rows = {(row["cell"], row["doc_id"]): row for row in store.rows()}
    cells = store.cells()
    from vtc.app import loading
    from vtc.eval.cells import make_cells

    runner = Runner(loading.load(str(video_model_folder), device="cpu"))
    (task,) = load_tasks(["clips"], [clip_task])
    for cell in make_cells(make_spec(settings), runner.loaded.fingerprint()):
        checked = runner.check(cell)
        assert checked.key() in cells
        for doc_id in range(len(DOCUMENTS)):
            batch = runner.prepare([task.conversation(doc_id, Clips(VideoReading(frames=6)))])
            (alone,) = runner.answer(batch, checked, task.generation({}))
            row = rows[checked.key(), doc_id]
            assert row["text"] == alone.text
            assert row["visual_tokens_in"] == alone.visual_tokens_in > 0
            assert row["visual_tokens_kept"] == alone.visual_tokens_kept
    with pytest.raises(InputError, match=r"with video \{'frames': 6\}, not \{'frames': 4\}; choose another --out"):
        run_sweep(make_spec({**settings, "video": {"frames": 4}}))


def test_lmms_eval_answers_videos_as_a_sweep_does(video_model_folder: Path, clip_task: Path) -> None:
    with muted():
        from lmms_eval.evaluator import simple_evaluate
        from lmms_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(clip_task), include_defaults=False)
        arguments = f"pretrained={video_model_folder},method=random,retention=0.5,frames=6,device=cpu"
        runs = [
            simple_evaluate(
                "vtc", model_args=arguments, tasks=["clips"], task_manager=manager, batch_size=size, bootstrap_iters=0
            )
            for size in (1, 6)
        ]
    one, six = ([sample["resps"][0][0] for sample in run["samples"]["clips"]] for run in runs)
    assert one == six and len(one) == len(DOCUMENTS)


def test_a_model_without_video_is_named_before_anything_is_answered(
    model_folder: Path, clip_task: Path, tmp_path: Path
) -> None:
    settings = {"model": str(model_folder), "tasks": ["clips"], "include_path": [str(clip_task)]}
    with pytest.raises(InputError, match="task 'clips', document 0 shows a video; llava models take none"):
        run_sweep(make_spec({**settings, "device": "cpu", "out": str(tmp_path / "out")}))
    assert not (tmp_path / "out").exists()


def test_frame_lists_have_names_for_messages() -> None:
    assert frame_list([np.zeros((4, 4, 3), np.uint8)], "a.gif").name == "a.gif"
