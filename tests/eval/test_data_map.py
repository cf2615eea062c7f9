"""`data_map`: local files in place of a task's data sets and videos, for this task alone."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtc.errors import InputError, UnknownName
from vtc.eval.catalogue import SweepTask, load_tasks
from vtc.eval.data_map import read_data_map
from vtc.eval.local_rows import data_files, load_rows
from vtc.eval.rescoring import rescore
from vtc.eval.spec import make_spec
from vtc.eval.store import Store
from vtc.eval.sweep import run_sweep

CODE = """
import os

from datasets import load_dataset
from PIL import Image

HOME = os.environ["HF_HOME"]


def join_pictures(rows):
    pictures = {row["id"]: row["image"] for row in load_dataset("made/up", "pictures", split="test", token=True)}
    return rows.map(lambda row: {"image": pictures[row["picture"]]})


def shown(doc):
    return [doc["image"].convert("RGB")]


def from_disk(doc):
    late = os.getenv("HF_HOME", "~/.cache/huggingface")
    assert late == HOME
    return [Image.open(os.path.join(late, "made_up", "videos", doc["picture"] + ".png"))]


def score(doc, results):
    return {"accuracy": float(results[0] == doc["answer"])}
"""
YAML = """
task: {name}
dataset_path: made/up
dataset_name: questions
dataset_kwargs: {{token: true{more}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.{visual}
doc_to_text: question
doc_to_target: answer
process_results: !function utils.score
{process}
generation_kwargs: {{max_new_tokens: 3}}
metric_list: [{{metric: accuracy, aggregation: mean, higher_is_better: true}}]
"""
ROWS = [{"question": "Which?", "answer": "red", "picture": colour} for colour in ("red", "blue", "green")]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with two tasks on one data set, one that shows pictures of another, and one that seeks them on disk."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "utils.py").write_text(CODE)
    for name, visual, process, more in (
        ("joined", "shown", "process_docs: !function utils.join_pictures", ""),
        ("joined_too", "shown", "process_docs: !function utils.join_pictures", ""),
        ("plain", "shown", "", ""),
        ("on_disk", "from_disk", "", ", cache_dir: made_up/videos, video: true"),
    ):
        (folder / f"{name}.yaml").write_text(YAML.format(name=name, visual=visual, process=process, more=more))
    (folder / "both.yaml").write_text("group: both\ntask: [joined, on_disk]\n")
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with one picture of each colour."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for colour in ("red", "blue", "green"):
        Image.new("RGB", (32, 24), colour).save(folder / f"{colour}.png")
    return folder


def lines(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def mapping(tmp_path: Path, pictures: Path) -> dict[str, Any]:
    """Questions of `joined` and the pictures that its code loads."""
    rows = [{"id": path.stem, "image": path.name} for path in sorted(pictures.iterdir())]
    return {
        "joined": lines(tmp_path / "questions.jsonl", ROWS),
        "made/up:pictures": {"data": lines(pictures / "pictures.jsonl", rows)},
    }


def colours(task: SweepTask) -> list[Any]:
    """The middle pixel of each document's picture."""
    chats = [task.conversation(doc_id) for doc_id in range(len(task.documents))]
    return [chat[0]["content"][0]["image"].getpixel((9, 9)) for chat in chats]


def test_questions_and_what_the_code_loads_besides_come_from_files(tasks: Path, mapping: dict[str, Any]) -> None:
    (task,) = load_tasks(["joined"], [tasks], data_map=mapping)
    assert colours(task) == [(255, 0, 0), (0, 0, 255), (0, 128, 0)]
    assert [task.documents[n]["question"] for n in range(3)] == ["Which?"] * 3


@pytest.mark.parametrize("kind", ["parquet", "json", "csv", "saved", "folder"])
def test_formats(kind: str, tasks: Path, tmp_path: Path, pictures: Path) -> None:
    import datasets

    named = [{**row, "image": f"{row['picture']}.png"} for row in ROWS]
    opened = [{**row, "image": Image.new("RGB", (32, 24), row["picture"])} for row in ROWS]
    place = tmp_path / "data"
    place.mkdir()
    given: dict[str, str] = {"data": str(place / f"rows.{kind}"), "media": str(pictures)}
    if kind == "parquet":
        datasets.Dataset.from_list(opened).to_parquet(given["data"])
    elif kind == "json":
        Path(given["data"]).write_text(json.dumps(named))
    elif kind == "csv":
        head = ",".join(named[0])
        Path(given["data"]).write_text("\n".join([head, *(",".join(row.values()) for row in named)]))
    elif kind == "saved":
        given["data"] = str(place)
        datasets.DatasetDict({"test": datasets.Dataset.from_list(opened)}).save_to_disk(place)
    else:  # as on the hub: a folder a configuration, bytes in place of pictures
        given["data"] = str(place)
        for part, split in enumerate(("test", "test", "validation")):
            stored = {**ROWS[part], "image": {"bytes": (pictures / named[part]["image"]).read_bytes(), "path": None}}
            file = place / "questions" / f"{split}-0000{part}-of-00003.parquet"
            file.parent.mkdir(exist_ok=True)
            datasets.Dataset.from_list([stored]).to_parquet(file)
    (task,) = load_tasks(["plain"], [tasks], data_map={"plain": given})
    assert colours(task) == [(255, 0, 0), (0, 0, 255), (0, 128, 0)][: 2 if kind == "folder" else 3]


def test_media_lie_where_the_code_looks_for_them(tasks: Path, mapping: dict[str, Any], pictures: Path) -> None:
    import datasets.load

    before = dict(os.environ), datasets.load.load_dataset_builder, type(os.environ).__getitem__
    for key in ("on_disk", "both", "made/up"):
        data = {"data": mapping["joined"]}
        given = {"on_disk": data, key: {"media": str(pictures)} | (data if key == "on_disk" else {})}
        (task,) = load_tasks(["on_disk"], [tasks], data_map=given)
        assert colours(task)[1] == (0, 0, 255), key
    unpacked = pictures.parent / "unpacked"
    (unpacked / "videos").mkdir(parents=True)
    Image.new("RGB", (32, 24), "white").save(unpacked / "videos" / "red.png")
    (task,) = load_tasks(["on_disk"], [tasks], data_map={"on_disk": data | {"media": str(unpacked)}})
    assert task.conversation(0)[0]["content"][0]["image"].getpixel((9, 9)) == (255, 255, 255)
    assert (dict(os.environ), datasets.load.load_dataset_builder, type(os.environ).__getitem__) == before


def test_only_the_mapped_task_changes(tasks: Path, mapping: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"'joined_too' cannot be loaded here.* the data set 'made/up:questions'"):
        load_tasks(["joined", "joined_too"], [tasks], data_map=mapping)
    both = mapping | {"made/up:questions": mapping["joined"]}
    assert len(load_tasks(["joined", "joined_too"], [tasks], data_map=both)) == 2


def test_threads_keep_their_maps_apart(tasks: Path, mapping: dict[str, Any], tmp_path: Path) -> None:
    other = mapping | {"joined": lines(tmp_path / "one.jsonl", ROWS[2:])}
    found: dict[int, list[int]] = {0: [], 1: []}
    barrier = threading.Barrier(2)

    def load(number: int) -> None:
        barrier.wait()
        for _ in range(3):
            (task,) = load_tasks(["joined"], [tasks], data_map=(mapping, other)[number])
            found[number].append(len(task.documents))

    threads = [threading.Thread(target=load, args=(number,)) for number in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: [3] * 3, 1: [1] * 3}


def test_the_fingerprint_follows_the_data(tasks: Path, mapping: dict[str, Any], tmp_path: Path) -> None:
    def fingerprint() -> str:
        return load_tasks(["joined"], [tasks], data_map=mapping)[0].fingerprint

    first = fingerprint()
    moved = tmp_path / "elsewhere.jsonl"
    os.rename(mapping["joined"], moved)
    mapping["joined"] = str(moved)
    assert fingerprint() == first
    lines(moved, [*ROWS[:2], ROWS[2] | {"answer": "green"}])
    assert fingerprint() != first
    lines(moved, ROWS)
    assert fingerprint() == first
    file = Path(mapping["made/up:pictures"]["data"])
    lines(file, [json.loads(line) | {"more": 1} for line in file.read_text().splitlines()])
    assert fingerprint() != first, "pictures that the code loads besides count as well"


REFUSED: list[tuple[Callable[[Path], Any], str]] = [
    (lambda f: {"joined": "none.parquet"}, r"data_map: 'joined', data: no file or folder 'none\.parquet'"),
    (lambda f: {"joined": 3}, r"'joined', data is 3, not a path; write a line such as"),
    (lambda f: {"joined": {"path": "x"}}, r"'joined' is given .*; write a line such as"),
    (lambda f: {"joined": str(f / "tasks" / "utils.py")}, r"utils\.py' is none of \.parquet, \.json"),
    (lambda f: {"joined": {"media": str(f / "tasks" / "utils.py")}}, r"utils\.py' is no folder"),
    (lambda f: {"joined": str(f / "tasks")}, r"for task 'joined': folder '.*' holds none of \.parquet"),
    (lambda f: f / "none.yaml", r"data map '.*none\.yaml' is not readable as YAML"),
]


@pytest.mark.parametrize(("given", "words"), REFUSED)
def test_maps_that_cannot_be_used_are_refused(given: Callable[[Path], Any], words: str, tasks: Path) -> None:
    with pytest.raises(InputError, match=words):
        load_tasks(["joined"], [tasks], data_map=given(tasks.parent))


def test_broken_files_name_file_and_task(tasks: Path, mapping: dict[str, Any]) -> None:
    Path(mapping["joined"]).write_text("{broken")
    with pytest.raises(InputError, match=r"data_map: 'joined', for task 'joined': '.*questions\.jsonl' cannot be read"):
        load_tasks(["joined"], [tasks], data_map=mapping)


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", ""), ("a.jsonl", "\n\n"), ("a.json", "[]"), ("a.csv", "question,image\n")]
)
def test_files_without_rows_are_refused(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=rf"{name}' (holds no rows; write|cannot be read: (?!StopIteration))"):
        load_rows(tmp_path / name, None, "test", None)


def test_missing_columns_name_file_task_and_columns(tmp_path: Path) -> None:
    file = lines(tmp_path / "pope.jsonl", [{"question": "Is it?", "answer": "yes"}])
    words = (
        r"task 'pope' reads the columns question_id, question, answer, image; '.*pope\.jsonl' lacks question_id, image"
    )
    with pytest.raises(InputError, match=words + " and has question, answer"):
        load_tasks(["pope"], data_map={"pope": file})


def test_misspelt_tasks_are_refused(tasks: Path, mapping: dict[str, Any]) -> None:
    with pytest.raises(UnknownName, match="unknown task 'joind'; did you mean 'joined'"):
        load_tasks(["joined"], [tasks], data_map={"joind": mapping["joined"]})


def test_paths_in_a_file_start_at_its_folder(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a\n1\n")
    (tmp_path / "map.yaml").write_text("pope: rows.csv\nmvbench: {media: .}\n")
    read = read_data_map(tmp_path / "map.yaml")
    assert read.entries["pope"].data == tmp_path / "rows.csv" and read.entries["mvbench"].media == tmp_path
    (tmp_path / "list.yaml").write_text("- pope\n")
    with pytest.raises(InputError, match=r"list\.yaml' holds \['pope'\]"):
        read_data_map(tmp_path / "list.yaml")


def test_files_of_a_folder_are_those_of_the_configuration_and_split(tmp_path: Path) -> None:
    for name in ("en/dev-0.parquet", "en/test-0.parquet", "cn/dev-0.parquet", "dataset_infos.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert data_files(tmp_path, "cn", "dev") == [tmp_path / "cn" / "dev-0.parquet"]
    assert data_files(tmp_path, "en", "test") == [tmp_path / "en" / "test-0.parquet"]
    assert len(data_files(tmp_path, None, "dev")) == 2
    (tmp_path / "en" / "dev.csv").touch()
    with pytest.raises(InputError, match="files of several kinds"):
        data_files(tmp_path, "en", "dev")


def test_a_sweep_and_its_rescoring_use_the_map(
    tasks: Path, mapping: dict[str, Any], model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "map.yaml").write_text(json.dumps(mapping))
    spec = make_spec(
        {
            "model": str(model_folder), "tasks": ["joined"], "include_path": [tasks], "methods": ["random"],
            "retentions": [0.5], "data_map": str(tmp_path / "map.yaml"), "out": str(tmp_path / "out"),
        }
    )  # fmt: skip
    result = run_sweep(spec)
    assert not result.failures and result.answered == 6
    before = [record["value"] for record in Store(result.folder).metrics()]
    assert rescore(result.folder) == []
    after = [record["value"] for record in Store(result.folder).metrics()]
    assert len(before) == 2 and np.allclose(before, after[-2:])
    os.rename(tmp_path / "map.yaml", tmp_path / "moved.yaml")
    with pytest.raises(InputError, match=r"map\.yaml"):
        rescore(result.folder)
    assert rescore(result.folder, data_map=tmp_path / "moved.yaml") == []
