"""Rows of the video benchmarks in the columns of the real data sets, and small clips where their code looks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np

Row = dict[str, Any]
N = 2
"""Rows of each."""
MVBENCH = {
    "action_sequence": "star/Charades_segment", "action_prediction": "star/Charades_segment",
    "action_antonym": "ssv2_video_mp4", "fine_grained_action": "Moments_in_Time_Raw/videos",
    "unexpected_action": "FunQA_test/test", "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_segment", "object_shuffle": "perception/videos",
    "moving_direction": "clevrer/video_validation", "action_localization": "sta/sta_video_segment",
    "scene_transition": "scene_qa/video", "action_count": "perception/videos",
    "moving_count": "clevrer/video_validation", "moving_attribute": "clevrer/video_validation",
    "state_change": "perception/videos", "fine_grained_pose": "nturgbd_convert",
    "character_order": "perception/videos", "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/video_fps3_hq_segment", "counterfactual_inference": "clevrer/video_validation",
}  # fmt: skip
"""Configuration -> the folder of its videos."""


def write_clip(file: Path) -> None:
    """Six frames of 64 x 48 pixels."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(6):
            pixels = np.full((48, 64, 3), 40 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


def _each(**columns: Callable[[int], Any]) -> Callable[[], Iterator[Row]]:
    return lambda: ({name: make(n) for name, make in columns.items()} for n in range(N))


def _clip(n: int) -> str:
    return f"clip{n}"


MOTION = "What moves?\nA. up\nB. down"
CAPTIONS = "Which sentence fits?\nSentence A: it goes up.\nSentence B: it goes down."
TEMPCOMPASS: dict[str, Callable[[int], Any]] = {
    "video_id": _clip, "dim": lambda n: ("direction", "speed")[n],
}  # fmt: skip
CHATGPT: dict[str, Callable[[int], Any]] = {"video_name": _clip, "answer": lambda n: "A cup."}

MAKERS: dict[str, Callable[[], Iterator[Row]]] = {
    "videomme": _each(
        video_id=str, videoID=_clip, duration=lambda n: ("short", "long")[n], domain=lambda n: "Knowledge",
        sub_category=lambda n: "Astronomy", question_id=str, task_type=lambda n: "Counting Problem",
        question=lambda n: "How many?", options=lambda n: ["A. 1", "B. 2", "C. 3", "D. 4"], answer=lambda n: "AB"[n],
    ),
    "mlvu_dev": _each(
        video_name=lambda n: f"1_plotQA/clip{n}.mp4", question=lambda n: "What?\n(A) a cup\n(B) a dog",
        answer=lambda n: "AB"[n], task_type=lambda n: ("plotQA", "count")[n],
    ),
    "longvideobench_val_v": _each(
        id=str, video_path=lambda n: f"clip{n}.mp4", question=lambda n: "What?", correct_choice=int,
        option0=lambda n: "a cup", option1=lambda n: "a dog", option2=lambda n: "N/A", option3=lambda n: "N/A",
        option4=lambda n: "N/A", duration_group=lambda n: 15, question_category=lambda n: "S2E",
    ),
    "egoschema_subset": _each(
        question_idx=str, video_idx=_clip, question=lambda n: "What?", answer=str,
        option=lambda n: [f"{letter}. thing {letter}" for letter in "ABCDE"],
    ),
    "nextqa_mc_test": _each(
        video=int, question=lambda n: "why", answer=int, qid=str, type=lambda n: "CW",
        **{f"a{i}": lambda n, i=i: f"reason {i}" for i in range(5)},
    ),
    "perceptiontest_val_mc": _each(
        video_name=_clip, question=lambda n: "What?", question_id=str, options=lambda n: ["up", "down", "left"],
        answer_id=str, area=lambda n: "physics", reasoning=lambda n: "descriptive", tag=lambda n: ["motion"],
    ),
    "tempcompass_multi_choice": _each(
        question=lambda n: MOTION, answer=lambda n: ("A. up", "B. down")[n], **TEMPCOMPASS
    ),
    "tempcompass_yes_no": _each(question=lambda n: "Does it rise?", answer=lambda n: ("yes", "no")[n], **TEMPCOMPASS),
    "tempcompass_caption_matching": _each(
        question=lambda n: CAPTIONS, answer=lambda n: "Sentence A: it goes up.", **TEMPCOMPASS
    ),
    "tempcompass_captioning": _each(
        question=lambda n: "Describe.", answer=lambda n: "", mc_question=lambda n: MOTION,
        mc_answer=lambda n: "A. up", **TEMPCOMPASS,
    ),
    "activitynetqa": _each(
        video_name=_clip, question=lambda n: "what is it", answer=lambda n: "cup", question_id=str, type=str,
    ),
    "videochatgpt_gen": _each(question=lambda n: "What?", **CHATGPT),
    "videochatgpt_temporal": _each(question=lambda n: "What first?", **CHATGPT),
    "videochatgpt_consistency": _each(
        video_name=lambda n: "clip0", question_1=lambda n: ("What?", "None")[n],
        question_2=lambda n: ("None", "Which?")[n], answer=lambda n: "A cup.",
    ),
}  # fmt: skip
"""Name of a task -> its rows; those of MVBench are `write_mvbench`."""


def write_mvbench(folder: Path, clips: Path) -> None:
    """One JSON file a configuration, as on the hub, and the videos below `clips`."""
    (folder / "json").mkdir(parents=True)
    for name, place in MVBENCH.items():
        rows = [
            {"video": f"clip{n}.mp4", "question": "What?", "candidates": ["up", "down"], "answer": ("up", "down")[n]}
            for n in range(N)
        ]
        (folder / "json" / f"{name}.json").write_text(json.dumps(rows))
        for n in range(N):
            write_clip(clips / place / f"clip{n}.mp4")


PLACES: dict[str, str] = {
    "videomme": "clip{}.mp4", "mlvu_dev": "1_plotQA/clip{}.mp4", "longvideobench_val_v": "videos/clip{}.mp4",
    "egoschema_subset": "videos/clip{}.mp4", "nextqa_mc_test": "{}.mp4", "perceptiontest_val_mc": "clip{}.mp4",
    "tempcompass": "clip{}.mp4", "activitynetqa": "all_test/v_clip{}.mp4", "videochatgpt": "clip{}.mp4",
}  # fmt: skip
"""Task or group -> where its clips lie in its `media` folder: as unpacked, or without the folder above them."""
