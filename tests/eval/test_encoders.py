"""`vtc encoders`: metrics against plain loops, its own features against open_clip's, resuming, and what is refused."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import vtc
from vtc.adapters.pairs import OpenClip
from vtc.app.catalogue import acting_inside
from vtc.app.encoding import load_encoder
from vtc.cli.main import app
from vtc.errors import InputError, UnknownName, UnsupportedMethod, UnsupportedModel
from vtc.eval.encoders.folders import captions_of, class_task
from vtc.eval.encoders.metrics import rank_of, speed, within
from vtc.eval.encoders.run import Pictures, run_encoders
from vtc.eval.encoders.scenes import scene_tasks
from vtc.eval.rescoring import rescore
from vtc.eval.results import read_results
from vtc.eval.store import Store

TOME, LABEL = "tome(inside=true)", "tome(inside=True)"
SMALL: dict[str, Any] = {"methods": [TOME], "retentions": [1.0, 0.5], "batch_size": 4}


@pytest.fixture(scope="module")
def encoder() -> Any:
    return load_encoder("tiny-clip", device="cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of three pictures, of which one is broken, and a file of captions of the others."""
    folder = tmp_path_factory.mktemp("photos")
    lines = []
    for number, colour in enumerate(("red", "green", "blue")):
        (folder / "classes" / colour).mkdir(parents=True)
        for shift in range(3):
            path = folder / "classes" / colour / f"{shift}.png"
            picture = Image.new("RGB", (40 + 20 * shift, 50), (90, 90, 90))
            picture.paste(colour, (5, 5 + shift, 35, 35))
            picture.save(path)
            if (number, shift) != (1, 2):
                lines.append({"image": f"classes/{colour}/{shift}.png", "caption": [f"a {colour} square", "a square"]})
    (folder / "classes" / "green" / "2.png").write_bytes(b"no picture")
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with (folder / "captions.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "caption"])
        writer.writeheader()
        writer.writerows({"image": line["image"], "caption": text} for line in lines for text in line["caption"])
    return folder


def test_ranks_agree_with_a_plain_loop() -> None:
    torch.manual_seed(0)
    pictures = torch.nn.functional.normalize(torch.randn(7, 4).round(decimals=1), dim=-1)
    texts = [torch.nn.functional.normalize(torch.randn(count, 4), dim=-1) for count in (1, 2, 3, 1, 2, 1, 2)]
    texts[3][0] = texts[2][1]  # a tie
    to_text, to_image = within(pictures, texts)
    every = [(text, owner) for owner, own in enumerate(texts) for text in own]
    for i, picture in enumerate(pictures):
        order = sorted(range(len(every)), key=lambda n: (-float(picture @ every[n][0]), n))
        assert to_text[i] == next(rank for rank, n in enumerate(order) if every[n][1] == i)
    for n, (text, owner) in enumerate(every):
        order = sorted(range(len(pictures)), key=lambda i: (-float(pictures[i] @ text), i))
        assert to_image[n] == order.index(owner)
    near = torch.randn(50, 12).round(decimals=1)
    target = torch.randint(0, 12, (50,))
    plain = [
        sorted(range(12), key=lambda c: (-float(row[c]), c)).index(int(t)) for row, t in zip(near, target, strict=True)
    ]
    assert rank_of(near, target).tolist() == plain


def test_speed_is_the_median_over_batches() -> None:
    rows = [
        {"batch": first, "seconds": seconds} for first, seconds in ((0, 0.5), (0, 0.5), (2, 0.1), (2, 0.1), (4, 0.25))
    ]
    measured = speed(rows)
    assert measured.value == 4.0 and measured.doc_ids == (0, 2, 4)


def test_everything_kept_is_open_clip_to_the_bit(encoder: OpenClip) -> None:
    torch.manual_seed(0)
    model, pixels, texts = encoder.model, torch.randn(3, 3, 168, 168), ["a red circle", "the word cat"]
    with torch.inference_mode():
        theirs, _ = model.get_logits(
            pixels, open_clip.get_tokenizer(f"local-dir:{vtc.embedded.model_path('tiny-clip')}")(texts)
        )
        for method in ("tome", "pitome"):
            with vtc.compress(model, method, inside=True, retention=1.0):
                ours = model.logit_scale.exp() * encoder.pictures(pixels) @ encoder.texts(texts).T
            assert torch.equal(ours, theirs)


def test_tiny_clip_knows_held_out_scenes(encoder: OpenClip) -> None:
    for task in scene_tasks(encoder, 40):
        pixels = torch.stack([encoder.prepare(document.open()) for document in task.documents])
        rows = task.answers(encoder.pictures(pixels), range(len(pixels)))
        found = task.measured([{"doc_id": doc_id, **row} for doc_id, row in enumerate(rows)])
        chance = 1 / len(task.documents) if not getattr(task, "classes", ()) else 1 / len(task.classes)  # type: ignore[attr-defined]
        assert found[task.main_metric].value > 3 * chance


def test_a_run_from_the_command_line_resumes_and_loses_only_what_is_broken(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = {"methods": TOME, "retentions": "1.0,0.5", "images": photos / "classes", "batch-size": 4, "out": out}
    given["captions"] = photos / "captions.jsonl"
    command = ["encoders", "--json", *(part for name, value in given.items() for part in (f"--{name}", str(value)))]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 1  # the broken picture
    summary = json.loads(first.stdout)
    assert [(each["task"], each["doc_id"]) for each in summary["unanswered"]] == [("classes", 7)]
    assert "green/2.png" in summary["unanswered"][0]["reason"] and summary["incomplete"] == []
    lines = {(line["task"], line["metric"], line["method"], line["retention"]): line for line in summary["metrics"]}
    untouched, kept = lines["classes", "top1", "none", 1.0], lines["classes", "top1", LABEL, 1.0]
    assert untouched["n"] == 8 and kept["value"] == untouched["value"] and kept["diff"] == 0.0
    half = lines["captions", "text_to_image_r1", LABEL, 0.5]
    assert half["visual_tokens_kept"] == 72 and half["visual_tokens_in"] == 144 and half["flops_share"] < 0.9
    assert half["diff_ci_low"] <= half["diff"] <= half["diff_ci_high"]
    assert lines["captions", "images_per_second", LABEL, 0.5]["value"] > 0
    assert (out / "report.html").is_file() and (out / "samples" / "classes.json").is_file()

    with pytest.raises(InputError, match=r"delete its metrics\.jsonl and give the same `vtc encoders` command again"):
        rescore(out)
    rows = (out / "rows.jsonl").read_text().splitlines(keepends=True)
    assert len(rows) == 3 * 8 + 3 * 8
    (out / "rows.jsonl").write_text("".join(rows[:-5]) + '{"half": ')  # killed in the middle of a line
    (out / "metrics.jsonl").unlink()
    again = json.loads(CliRunner().invoke(app, command).stdout)
    assert again["answered"] == 5
    accuracy = [line for line in again["metrics"] if line["metric"] != "images_per_second"]
    assert [line["value"] for line in accuracy] == [
        line["value"] for line in summary["metrics"] if line["metric"] != "images_per_second"
    ]


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(photos: Path, tmp_path: Path) -> None:
    given = {"methods": TOME, "retentions": "0.75,0.5,0.25", "captions": photos / "captions.jsonl", "batch-size": 2}
    command = ["encoders", "--json", *(part for name, value in given.items() for part in (f"--{name}", str(value)))]
    whole, cut = ([*command, "--out", str(tmp_path / name)] for name in ("whole", "cut"))
    expected = json.loads(CliRunner().invoke(app, whole).stdout)
    process = subprocess.Popen(
        [sys.executable, "-m", "vtc", *cut], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    rows = tmp_path / "cut" / "rows.jsonl"
    while process.poll() is None and not (rows.exists() and rows.read_text().count("\n") > 2):
        time.sleep(0.01)
    process.kill()
    process.wait()
    begun = rows.read_text().count("\n")
    again = json.loads(CliRunner().invoke(app, cut).stdout)
    assert again["answered"] == expected["answered"] - begun > 0
    timed = "images_per_second"
    assert [(line["value"], line["diff"]) for line in again["metrics"] if line["metric"] != timed] == [
        (line["value"], line["diff"]) for line in expected["metrics"] if line["metric"] != timed
    ]


def test_scenes_without_a_word_about_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtc.eval.encoders.run.write_report", read_results)  # without drawing
    result = run_encoders({"retentions": [0.5], "limit": 4, "batch_size": 4, "out": tmp_path}, Pictures(scenes=8))
    swept = {cell["label"] for cell in Store(tmp_path).cells().values()}
    assert {"none", "tome(inside=True)", "pitome(inside=True)"} <= swept and not result.failures


def test_methods_are_found_by_what_they_do(encoder: OpenClip) -> None:
    found = acting_inside(encoder.model)
    assert found["tome"] == found["pitome"] == {"inside": True} and found["pixelprune"] == {}
    assert not {"vtc_cls", "fastv"} & set(found)


def test_classes_templates_and_captions_of_files(photos: Path, encoder: OpenClip, tmp_path: Path) -> None:
    names, templates = tmp_path / "names.txt", tmp_path / "templates.txt"
    names.write_text("blue = sky\n")
    templates.write_text("a {}\nthe {}\n")
    task = class_task(photos / "classes", encoder, names, templates)
    assert task.classes == ("sky", "green", "red") and [task.documents[i].target for i in range(4)] == [0, 1, 2, 0]
    wanted = encoder.texts(["a sky", "the sky"]).mean(0)
    assert task.texts is not None and torch.allclose(task.texts[0], wanted / wanted.norm(), atol=1e-6)
    assert captions_of(photos / "captions.csv") == captions_of(photos / "captions.jsonl")
    for text, problem in (("a\nb\n", "2 names for 3"), ("x = y\n", "'x'")):
        names.write_text(text)
        with pytest.raises(InputError, match=problem):
            class_task(photos / "classes", encoder, names)
    templates.write_text("no class")
    with pytest.raises(InputError, match="no class"):
        class_task(photos / "classes", encoder, None, templates)
    (tmp_path / "bad.jsonl").write_text('{"image": "a.png"}\n')
    with pytest.raises(InputError, match="line 1"):
        captions_of(tmp_path / "bad.jsonl")


@pytest.mark.parametrize(
    ("settings", "pictures", "kind", "says"),
    [
        ({}, {"images": Path("nowhere")}, InputError, "nowhere"),
        ({}, {"captions": Path("nowhere.csv")}, InputError, "nowhere.csv"),
        ({"model": "ViT-B-32"}, {}, InputError, "--pretrained"),
        ({"model": "tiny-llava"}, {}, UnsupportedModel, "vtc sweep"),
        ({"methods": ["tom"]}, {}, UnknownName, "tome"),
        ({"methods": ["vtc_cls"]}, {}, UnsupportedMethod, "encoder alone"),
        ({"methods": ["downsample"]}, {}, UnsupportedMethod, "position embeddings"),
    ],
)
def test_refusals(settings: dict[str, Any], pictures: dict[str, Any], kind: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=says):
        run_encoders({**SMALL, **settings, "out": tmp_path / "out"}, Pictures(**pictures))
    assert not (tmp_path / "out").exists()


def test_pictures_are_one_kind_or_the_other() -> None:
    for wrong in ({"classes": Path("a")}, {"scenes": 5, "images": Path("a")}, {"scenes": 1}):
        with pytest.raises(InputError):
            Pictures(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_checkpoints_of_transformers(name: str, tmp_path: Path) -> None:
    import transformers as t

    from vtc.eval.tiny.clip import tokenizer

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 32, "patch_size": 8}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    text |= {"vocab_size": 200, "max_position_embeddings": 16, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    words, side = tokenizer(), {"height": 32, "width": 32}
    if name == "clip":
        model = t.CLIPModel(t.CLIPConfig(vision_config=vision, text_config=text, projection_dim=16))
        processor = t.CLIPProcessor(t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=side), words)
    else:
        model = t.SiglipModel(t.SiglipConfig(vision_config=vision, text_config=text))
        processor = t.SiglipProcessor(t.SiglipImageProcessor(size=side), words)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = load_encoder(str(tmp_path), device="cpu")
    pixels = loaded.prepare(Image.new("RGB", (50, 40), "red"))[None]
    with torch.inference_mode():
        output = model.eval().get_image_features(pixel_values=pixels)
        wanted = output if isinstance(output, torch.Tensor) else output.pooler_output
    torch.testing.assert_close(loaded.pictures(pixels), torch.nn.functional.normalize(wanted, dim=-1))
    assert loaded.patches(pixels) == 16 and np.allclose(loaded.texts(["a red ring"]).norm(), 1.0)
    assert loaded.adapter.shape.per_row == 4 * 32 * 32 + 2 * 32 * 64
