"""`vtc.show` and `vtc show`: what is drawn is what the methods did."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import vtc
from vtc.app import loading
from vtc.app.media import Video
from vtc.app.show import cells_of
from vtc.app.show.look import caption
from vtc.cli.main import app
from vtc.errors import InputError
from vtc.method.base import CacheStage
from vtc.testing import tiny_model
from vtc.testing.processors import tiny_processor

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 72, 3), dtype=np.uint8))
CLIP = Video(np.random.default_rng(1).integers(0, 256, (4, 40, 40, 3), dtype=np.uint8), np.arange(4) / 2, 2.0, 4)


@pytest.fixture(scope="module")
def loaded() -> loading.Loaded:
    """A random OneVision: tiles, newlines and video."""
    return loading.Loaded("", "", tiny_model("llava-onevision"), tiny_processor("llava-onevision"))


def show(loaded: loading.Loaded, *args: Any, **options: Any) -> Any:
    return vtc.show(loaded.model, loaded.processor, *args, max_new_tokens=2, side=64, **options)


def content(html: str) -> Any:
    return json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])  # type: ignore[index]


def test_stages_hold_what_the_trace_holds(loaded: loading.Loaded) -> None:
    look = show(loaded, [PICTURE, CLIP], "what?", ["pyramiddrop", "tome"], 0.5).look
    assert [type(each) for each in look.media] == [Image.Image, Video]
    drop, tome = look.seen
    assert [name for name, _ in drop.stages] == [f"before layer {layer}" for layer in (1, 2, 3)]
    alive = [[int(left.alive.sum()) for left in lefts] for _, lefts in drop.stages]
    assert alive == sorted(alive, reverse=True)
    for _, lefts in drop.stages:
        for left in lefts:
            ranked = ~np.isnan(left.scores)
            real = left.alive & ranked  # newlines stay and are not ranked
            assert left.into is None and left.scores[real].min() >= left.scores[ranked & ~left.alive].max()
    ((name, lefts),) = tome.stages
    assert name == "before the LLM"
    for left in lefts:
        assert left.scores is None and (left.into[left.alive] == np.flatnonzero(left.alive)).mean() > 0.5
        assert left.alive[left.into[left.into >= 0]].all()


def test_heads_show_what_one_of_them_keeps(loaded: loading.Loaded) -> None:
    """Every layer has a panel, also where one head or another keeps each entry and nothing seems to have left."""
    shown = show(loaded, PICTURE, "what?", "h2o", 0.9)
    (seen,) = shown.look.seen
    layers = len(vtc.adapters.of(loaded.model).layers)
    assert [name for name, _ in seen.stages] == [caption(CacheStage(layer)) for layer in range(layers)]
    tokens = shown.look.tokens
    assert all(vtc.tokens_to_keep(tokens, 0.9) <= left.alive.sum() <= tokens for _, (left,) in seen.stages)


def test_a_full_budget_draws_the_untouched_pictures(loaded: loading.Loaded) -> None:
    shown = show(loaded, PICTURE, "what?", "stride", 1.0)
    assert shown.look.seen[0].stages == () and shown.look.seen[0].answer == shown.look.answer
    assert shown.image.width > 64


def test_every_method_gets_every_budget() -> None:
    cells = cells_of(["stride", "hiprune@0.5+tome@0.5"], [0.5, 0.25])
    assert [(cell.name.split("@")[0], cell.budget) for cell in cells] == [
        ("stride", "retention 0.5"), ("stride", "retention 0.25"), ("hiprune", ""),
    ]  # fmt: skip
    assert [cell.budget for cell in cells_of(vtc.create("random"), keep=[3])] == ["keep 3"]


def test_the_page_holds_everything_and_loads_nothing(loaded: loading.Loaded, tmp_path: Path) -> None:
    shown = show(loaded, PICTURE, "is 1 < 2? </script>", ["fastv", "stride"], [0.9, 0.75])
    html = shown.save(tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert "http" not in re.sub(r"base64,[^\"]*", "", html)
    page = content(html)
    assert page["prompt"] == "is 1 < 2? </script>" and page["tokens"] == shown.look.tokens
    assert [method["name"] for method in page["methods"]] == ["fastv", "stride"]
    for method in page["methods"]:
        assert [cell["budget"] for cell in method["cells"]] == ["retention 0.75", "retention 0.9"]
        for cell in method["cells"]:
            (stage,) = cell["stages"]
            assert stage["kept"].startswith("data:image/webp;base64,")
            assert stage["scores"] is None or stage["scores"] != stage["kept"]
    assert shown.save(tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG" == shown._repr_png_()[:4]


def test_scores_are_drawn_beside_what_was_kept(loaded: loading.Loaded) -> None:
    plain, ranked = (show(loaded, PICTURE, "what?", "fastv", 0.75, scores=scores).image for scores in (False, True))
    assert ranked.width * ranked.height > plain.width * plain.height


def test_what_cannot_be_shown_is_refused(loaded: loading.Loaded, tmp_path: Path) -> None:
    def refused(match: str, run: Any) -> None:
        with pytest.raises(InputError, match=match):
            run()

    refused("nothing to show", lambda: show(loaded, [], "what?", "stride", 0.5))
    refused("no method given", lambda: show(loaded, PICTURE, "what?", []))
    refused("pass one of them", lambda: show(loaded, PICTURE, "what?", "stride", 0.5, keep=3))
    shown = show(loaded, PICTURE, "what?", "stride", 0.5)
    refused(r"ends in '\.gif'", lambda: shown.save(tmp_path / "a.gif"))
    (tmp_path / "file").write_text("")
    refused("cannot write", lambda: shown.save(tmp_path / "file" / "a.png"))


def test_the_command(tmp_path: Path) -> None:
    PICTURE.save(file := tmp_path / "a.png")
    out = tmp_path / "shown.html"
    asked = ["show", "--image", str(file), "--prompt", "what is this?", "--method", "vtc_cls", "--method", "stride"]
    result = CliRunner().invoke(app, [*asked, "--keep", "20,40", "--side", "64", "--out", str(out)])
    assert result.exit_code == 0 and str(out) in result.output
    assert [len(method["cells"]) for method in content(out.read_text())["methods"]] == [2, 2]
    for extra, match in ((["--retention", "half"], "no number"), (["--retention", "0.5", "--out", "a.gif"], "ends in")):
        with pytest.raises(InputError, match=match):
            CliRunner().invoke(app, [*asked, *extra], catch_exceptions=False)
    with pytest.raises(InputError, match="nothing to show"):
        CliRunner().invoke(app, ["show", "--prompt", "a", "--method", "stride", "--keep", "3"], catch_exceptions=False)


def test_explore_follows_its_widgets(loaded: loading.Loaded) -> None:
    media = {"one": PICTURE, "clip": CLIP}
    explorer: Any = vtc.explore(loaded.model, loaded.processor, media, "what?", methods=["stride", "fastv"], side=48)
    first = explorer.drawing.value
    assert first[:4] == b"\x89PNG" and "visual tokens per layer" in explorer.about.value
    assert explorer._repr_mimebundle_()["image/png"] == first
    explorer.retention.value = 0.9
    assert explorer.shown.look.seen[0].cell.retention == 0.9 and explorer.drawing.value != first
    explorer.method.value = "fastv"
    assert explorer.stage.options == ("all stages", "before layer 2")
    before = explorer.drawing.value
    explorer.stage.value, explorer.scores.value = "before layer 2", True
    assert explorer.drawing.value != before
    explorer.retention.value = 0.1  # two of four layers see everything
    assert explorer.shown is None and "cannot be met by" in explorer.about.value and explorer.drawing.value == b""
    explorer.picture.value, explorer.retention.value = "clip", 0.9
    assert len(explorer.shown.look.places[0].panels) == 4
    with pytest.raises(InputError, match="at least one picture"):
        vtc.explore(loaded.model, loaded.processor, {})
