"""The benchmark groups `vtc_image` and `vtc_video`: tasks of lmms-eval, what they need and what is known of them.

Names, data sets, columns, judges and folders are those of lmms-eval 0.7.3; a test compares them with its files. Numbers
of questions and licences are what the benchmarks' authors state; where that is not known for certain, nothing stands
here. A licence binds whoever uses the data: read it at the source.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vtc.app.pages import page

GPT_4O = "gpt-4o-2024-11-20"
GPT_35 = "gpt-3.5-turbo-1106"
RUN = "run in tests"
STAND_IN = "run, judge faked"
NOT_STATED = "not stated"
GROUPS = {
    "vtc_image": "image benchmarks",
    "vtc_video": "video benchmarks",
}


@dataclass(frozen=True)
class Benchmark:
    """One task of lmms-eval, or a group of tasks alike.

    `questions` of the split, None where not stated. `data` is the data set, with its configuration behind a colon;
    `also` what the task's code loads besides. `columns` are those that the task's code reads. `media` is the folder
    below HF_HOME where it looks for videos. `judge` is the model that scores, by default; `rules_first` if it is only
    asked where rules cannot read the answer. `needs` names programs or packages besides the extra `eval`.
    """

    name: str
    group: str
    data: str
    columns: tuple[str, ...]
    questions: int | None = None
    licence: str = NOT_STATED
    judge: str = ""
    rules_first: bool = False
    media: str = ""
    also: str = ""
    needs: str = ""
    note: str = ""
    not_run: str = ""

    @property
    def modality(self) -> str:
        """``image`` or ``video``."""
        return self.group.removeprefix("vtc_")

    @property
    def status(self) -> str:
        """Whether tests of this package run it from questions to metrics, and why not."""
        return f"not run: {self.not_run}" if self.not_run else STAND_IN if self.judge else RUN

    def record(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return {**asdict(self), "modality": self.modality, "status": self.status}


def _image(name: str, data: str, columns: str, questions: int | None, licence: str, **more: Any) -> Benchmark:
    return Benchmark(name, "vtc_image", data, tuple(columns.split()), questions, licence, **more)


def _video(name: str, data: str, columns: str, questions: int | None, licence: str, **more: Any) -> Benchmark:
    return Benchmark(name, "vtc_video", data, tuple(columns.split()), questions, licence, **more)


HUB = "lmms-lab-encoder/"
VIDEO_HUB = "lmms-eval/"
MMBENCH = "index question hint answer A B C D category L2-category source split image"
TEMPCOMPASS = "video_id question answer dim"

BENCHMARKS: tuple[Benchmark, ...] = (
    _image(
        "mme", f"{HUB}MME", "question_id question answer category image", 2374, NOT_STATED,
        note="scored in pairs of neighbouring questions: --limit must be even",
    ),
    _image("pope", f"{HUB}POPE", "question_id question answer image", 9000, "MIT"),
    _image(
        "gqa", f"{HUB}GQA:testdev_balanced_instructions", "imageId question answer", 12578, "CC BY 4.0",
        also=f"{HUB}GQA:testdev_balanced_images",
    ),
    _image(
        "vqav2_val", f"{HUB}VQAv2", "question_id question answers image", 214354, "CC BY 4.0",
        note="the answers of the test split are hidden; vqav2_val_lite is a sample",
    ),
    _image(
        "textvqa_val", f"{HUB}textvqa", "question_id question answers image", 5000, "CC BY 4.0",
        note="the answers of the test split are hidden; textvqa_val_lite is a sample",
    ),
    _image(
        "scienceqa_img", f"{HUB}ScienceQA:ScienceQA-IMG", "question choices answer hint image", 2017,
        "CC BY-NC-SA 4.0",
    ),
    _image(
        "mmbench_en_dev_static", f"{HUB}MMBench:en", MMBENCH, 4329, "Apache-2.0",
        note="mmbench_en_dev asks a judge where rules cannot read the answer",
    ),
    _image(
        "mmbench_cn_dev", f"{HUB}MMBench:cn", MMBENCH, 4329, "Apache-2.0", judge=GPT_4O, rules_first=True,
        note="an unreadable answer counts as a random one where the judge fails",
    ),
    _image("vizwiz_vqa_val", f"{HUB}VizWiz-VQA", "question_id question answers image", 4319, "CC BY 4.0"),
    _image(
        "seedbench", f"{HUB}SEED-Bench",
        "question_id question choice_a choice_b choice_c choice_d answer data_type image", 17990, "CC BY-NC 4.0",
        note="video questions show several pictures",
    ),
    _image("docvqa_val", f"{HUB}DocVQA:DocVQA", "question answers image", 5349, NOT_STATED),
    _image("chartqa", f"{HUB}ChartQA", "type question answer image", 2500, "GPL-3.0"),
    _image("ocrbench", "echo840/OCRBench", "dataset question question_type answer image", 1000, "MIT"),
    _image("infovqa_val", f"{HUB}DocVQA:InfographicVQA", "question answers image", 2801, NOT_STATED),
    _image("realworldqa", f"{HUB}RealWorldQA", "question answer image", 765, "CC BY-ND 4.0"),
    _image("mmstar", "Lin-Chen/MMStar", "index question answer category l2_category image", 1500, NOT_STATED),
    _image("vstar_bench", f"{HUB}vstar-bench", "question_id text label category image", 191, NOT_STATED),
    _image("ai2d", f"{HUB}ai2d", "question options answer image", 3088, NOT_STATED),
    _image(
        "refcoco_bbox_rec_val", f"{HUB}RefCOCO", "question_id answer bbox image", None, NOT_STATED,
        note="asks for a box; the refcoco_bbox and refcoco_seg tasks ask for a caption and need Java",
    ),
    _video(
        "videomme", f"{VIDEO_HUB}Video-MME",
        "videoID question options answer domain sub_category task_type question_id duration", 2700,
        "academic use only", media="videomme/data",
    ),
    _video(
        "mvbench", "OpenGVLab/MVBench", "video question candidates answer", 4000, "MIT", media="mvbench_video",
        note="20 tasks of 200 questions, each with a configuration and a folder of videos of its own",
    ),
    _video(
        "mlvu_dev", "sy1998/MLVU_dev", "video_name question answer task_type", 2174, "CC BY-NC-SA 4.0", media="mlvu",
        note="the answers of the test split are for its server",
    ),
    _video(
        "longvideobench_val_v", "longvideobench/LongVideoBench",
        "video_path question option0 option1 option2 option3 option4 correct_choice id duration_group"
        " question_category",
        1337, "CC BY-NC-SA 4.0", media="datasets/longvideobench/videos", needs="decord",
        note="an answer without a letter counts as a random one",
    ),
    _video(
        "egoschema_subset", f"{VIDEO_HUB}egoschema:Subset", "video_idx question option answer", 500, "Ego4D licence",
        media="egoschema/videos",
        note="the full set is scored by a server; an answer without a letter counts as a random one",
    ),
    _video(
        "nextqa_mc_test", f"{VIDEO_HUB}NExTQA:MC", "video question a0 a1 a2 a3 a4 answer", 8564, "MIT",
        media="nextqa/NExTVideo", note="an answer without a letter counts as a random one",
    ),
    _video(
        "perceptiontest_val_mc", f"{VIDEO_HUB}PerceptionTest_Val:mc_question_val",
        "video_name question options answer_id", 19140, "CC BY 4.0", media="perceptiontest_val/videos",
    ),
    *(
        _video(
            f"tempcompass_{name.replace('-', '_')}", f"{VIDEO_HUB}TempCompass:{name}", columns, questions,
            NOT_STATED, judge=GPT_35, rules_first=rules, media="tempcompass/videos",
        )
        for name, columns, questions, rules in (
            ("multi-choice", TEMPCOMPASS, 1580, True),
            ("yes_no", TEMPCOMPASS, 2453, True),
            ("caption_matching", TEMPCOMPASS, 1503, True),
            ("captioning", f"{TEMPCOMPASS} mc_question mc_answer", 2004, False),
        )
    ),
    _video(
        "activitynetqa", f"{VIDEO_HUB}ActivityNetQA", "video_name question answer question_id type", 8000, NOT_STATED,
        judge=GPT_4O, media="activitynetqa/all_test",
    ),
    *(
        _video(
            f"videochatgpt_{name}", f"{VIDEO_HUB}VideoChatGPT:{configuration}", columns, None, NOT_STATED,
            judge=GPT_4O, media="videochatgpt/Test_Videos", note="an answer that the judge fails on counts 0",
        )
        for name, configuration, columns in (
            ("gen", "Generic", "video_name question answer"),
            ("temporal", "Temporal", "video_name question answer"),
            ("consistency", "Consistency", "video_name question_1 question_2 answer"),
        )
    ),
)  # fmt: skip
"""In the order in which a sweep of the group answers them."""

_BY_NAME: Mapping[str, Benchmark] = {benchmark.name: benchmark for benchmark in BENCHMARKS}


def members(group: str) -> list[Benchmark]:
    """The benchmarks of ``vtc_image`` or ``vtc_video``."""
    return [benchmark for benchmark in BENCHMARKS if benchmark.group == group]


def expand(names: Iterable[str]) -> list[tuple[str, str]]:
    """Each name with what it came from: ``vtc_image`` and ``vtc_video`` become their tasks, others stay themselves."""
    return [
        (found, name)
        for name in names
        for found in ([each.name for each in members(name)] if name in GROUPS else [name])
    ]


def benchmark_of(names: Iterable[str]) -> Benchmark | None:
    """The benchmark that one of `names`, a task and the groups it came from, is."""
    return next((_BY_NAME[name] for name in names if name in _BY_NAME), None)


HEAD = ("task", "questions", "judge", "licence", "status")


def rows(group: str) -> list[Sequence[str]]:
    """A line of the table that `vtc tasks` prints for each benchmark of the group."""
    return [
        (each.name, str(each.questions or NOT_STATED), judge_text(each), each.licence, each.status)
        for each in members(group)
    ]


def judge_text(benchmark: Benchmark) -> str:
    """``none``, or the model; with a star where it is only asked for answers that rules cannot read."""
    return f"{benchmark.judge}*" if benchmark.rules_first else benchmark.judge or "none"


def details(benchmark: Benchmark) -> dict[str, str]:
    """What a benchmark is and what has to lie on disk for it, as `vtc tasks NAME` shows it; empty parts left out."""
    each = benchmark
    shown = {
        "group": each.group,
        "data set": f"{each.data}, on the hub or in a --data-map",
        "loads besides": each.also,
        "columns": ", ".join(each.columns),
        "videos": each.media and f"$HF_HOME/{each.media}",
        "needs": each.needs,
        "note": each.note,
        "questions": str(each.questions or NOT_STATED),
        "judge": judge_text(each),
        "licence": each.licence,
        "status": each.status,
    }
    return {name: text for name, text in shown.items() if text}


def task_page() -> str:
    """The document docs/tasks.md."""
    about = (
        "the groups `vtc_image` and `vtc_video`, as lmms-eval 0.7.3 has their tasks. A judge is the model that"
        " lmms-eval asks by default, at the address in OPENAI_API_URL with the key in OPENAI_API_KEY; a star: only"
        " where rules cannot read an answer. Tests run each task on a few rows made in its columns, from the questions"
        " to the metrics, where needed with a fake judge on the same machine, not on the data set itself. A licence"
        " binds whoever uses the data: read it at the source."
    )
    parts: list[Any] = []
    for group, title in GROUPS.items():
        parts.append(f"## `{group}`: {title}")
        parts.append((HEAD, [(f"`{name}`", *rest) for name, *rest in rows(group)]))
    needs = [
        (
            f"`{each.name}`",
            f"`{each.data}`" + (f" and `{each.also}`" if each.also else ""),
            ", ".join(f"`{column}`" for column in each.columns),
            f"`{each.media}`" if each.media else "",
            "; ".join(filter(None, [each.needs and f"needs {each.needs}", each.note])),
        )
        for each in BENCHMARKS
    ]
    parts.append("## What has to lie on disk")
    parts.append(
        "Data set and configuration on the hub, the columns that the task's code reads, and the folder below `HF_HOME`"
        " in which it looks for videos. `--data-map` puts other files in their places ([sweeps.md](sweeps.md))."
    )
    parts.append((("task", "data set:configuration", "columns", "videos", "notes"), needs))
    return page("Benchmark tasks", "python -m vtc.eval.documents", about, *parts)
