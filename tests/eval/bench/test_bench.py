"""What a bench records: arms, parts that add up, bytes that are really held, rounds that survive."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vtc.engine.attach import compress
from vtc.errors import BudgetError, InputError, UnknownName
from vtc.eval.bench.arms import arms
from vtc.eval.bench.clock import Clock, Memory
from vtc.eval.bench.parts import PARTS, Seams
from vtc.eval.bench.record import BENCH, ROUNDS, Record, read_record
from vtc.eval.bench.run import bench, chosen
from vtc.eval.bench.scene import Scene
from vtc.eval.bench.spec import BenchSpec, Load

ARMS = ["untouched", "random@0.25", "fastv(layer=1)@0.9", "limit at 130 tokens", "limit at 36 tokens"]


def test_arms_limits_and_what_is_left_out(measured: tuple[Record, Path]) -> None:
    record, _ = measured
    assert [(scene.batch, scene.new_tokens) for scene in record.main.values()] == [(1, 3), (2, 3)]
    assert [scene.visual for scene in record.curve] == [144, 288]
    for scene in record.main.values():
        assert list(scene.arms) == ARMS
        assert scene.arms["random@0.25"].limit == "limit at 36 tokens"
        reasons = dict(line.split(": ", 1) for line in scene.left_out)
        assert set(reasons) == {"downsample@0.25", "fastv(layer=1)@0.1"}
        assert "makes at least 144" in reasons["downsample@0.25"] and "cannot be met" in reasons["fastv(layer=1)@0.1"]
    for scene in record.curve:
        assert [facts.kind for facts in scene.arms.values()] == ["untouched", "method", "method"]


def test_the_cache_is_as_large_as_counted_and_the_limit_has_as_many_tokens(measured: tuple[Record, Path]) -> None:
    for scene in measured[0].main.values():
        for facts in scene.arms.values():
            assert facts.counted_kv_bytes in (None, facts.kv_bytes)
            if facts.kind == "method":
                assert facts.limit is not None and facts.counted_kv_bytes is not None
                short = scene.arms[facts.limit]
                assert short.visual == round(facts.visual)
                assert short.kv_bytes == pytest.approx(facts.kv_bytes, rel=0.5 / facts.visual)
        assert scene.arms["random@0.25"].kv_bytes == scene.arms["limit at 36 tokens"].kv_bytes


def test_parts_add_up(measured: tuple[Record, Path]) -> None:
    for scene in measured[0].scenes.values():
        assert len(scene.rounds) == 2
        for of_round in scene.rounds:
            assert list(of_round) == list(scene.arms)
            for arm, values in of_round.items():
                parts = [values[part] or 0.0 for part in PARTS]
                total, first = values["total"], values["first_token"]
                assert total is not None and first is not None
                assert sum(parts) == pytest.approx(total, rel=1e-3)
                assert min(parts) >= -1e-6 and 0 < first <= total
                assert (values["decode"] is None) == (scene.new_tokens == 1)
                assert first + (values["decode"] or 0.0) <= total + 1e-6
                attached = scene.arms[arm].kind == "method"
                for name in ("selection", "attach", "engine"):
                    assert (values[name] is not None) == attached
                peak, rest = values["peak_bytes"], values["rest_bytes"]
                assert (peak is None) == (rest is None)


def test_marks_change_nothing_and_go_away(clip: Any) -> None:
    from vtc import adapters
    from vtc.testing import tiny_inputs

    inputs = tiny_inputs("llava-clip", [[3, "image", 5], [7, "image", 2]], model=clip)
    options = {"max_new_tokens": 4, "do_sample": False}
    with compress(clip, "fastv", retention=0.7):
        plain = clip.generate(**inputs, **options)
    before = {name: len(module._forward_hooks) for name, module in clip.named_modules()}  # with transformers' own
    with compress(clip, "fastv", retention=0.7) as handle:
        seams = Seams(adapters.of(clip), Clock(torch.device("cpu")), handle)
        timed = clip.generate(**inputs, **options, stopping_criteria=[seams.token])
        seams.remove()
        again = clip.generate(**inputs, **options)
    assert torch.equal(plain, timed) and torch.equal(plain, again)
    assert len(seams.tokens) == 4 and len(seams.spans["passes"]) == 1
    # In front of the language model, behind it, and in front of the layer at which the method acts.
    assert len(seams.spans["selection"]) == 3 and len(seams.spans["vision"]) == 1
    assert {name: len(module._forward_hooks) for name, module in clip.named_modules()} == before
    assert "get_image_features" not in vars(adapters.of(clip).backbone)


def test_qwen_and_onevision_downsample(video_model_folder: Path, tmp_path: Path) -> None:
    spec = BenchSpec(
        str(video_model_folder), ("random", "fastv@0.01", "downsample"), (0.5,), (2,), new_tokens=2, repeats=1,
        warmup=0, load=Load(1, 168, 168), loads=(), device="cpu", prompt="what is shown ?",
    )  # fmt: skip
    (scene,) = bench(spec, tmp_path / "out").scenes.values()
    assert [line.split(":")[0] for line in scene.left_out] == ["fastv@0.01"]
    small = scene.arms["downsample@0.5"]
    assert small.visual <= 0.5 * scene.visual and small.counted_kv_bytes == small.kv_bytes and small.limit is None
    assert scene.values("downsample@0.5", "selection") == [] and len(scene.values("downsample@0.5", "total")) == 1
    assert set(scene.arms) - {"downsample@0.5"} == {"untouched", "random@0.5", scene.arms["random@0.5"].limit}


def test_a_killed_bench_keeps_its_rounds(small: BenchSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(small, methods=("random",), batch_sizes=(1,), loads=())
    folder, asked, calls = tmp_path / "out", Scene.request, []

    def request(self: Scene, *args: Any) -> Any:
        calls.append(args[0].name)
        if len(calls) == 5:  # in the second round
            raise KeyboardInterrupt
        return asked(self, *args)

    monkeypatch.setattr(Scene, "request", request)
    with pytest.raises(KeyboardInterrupt):
        bench(spec, folder)
    monkeypatch.setattr(Scene, "request", asked)
    kept = (folder / ROUNDS).read_text()
    assert kept.count("\n") == 1 and calls[:4] == ["untouched", "random@0.25", "limit at 36 tokens", "random@0.25"]
    (folder / ROUNDS).write_text(kept + kept[:40])  # killed while it wrote the next line
    with pytest.raises(InputError, match=r"holds a bench; add --resume"):
        bench(spec, folder)
    with pytest.raises(InputError, match=r"holds another bench \(new_tokens 3 there, 4 here\)"):
        bench(replace(spec, new_tokens=4), folder, resume=True)
    record = bench(replace(spec, repeats=3), folder, resume=True)
    (scene,) = record.scenes.values()
    assert len(scene.rounds) == 3 and json.loads(kept)["arms"] == scene.rounds[0]
    (read,) = read_record(folder).scenes.values()
    assert len(read.rounds) == 3 and read.arms == scene.arms
    assert read.rounds[2]["untouched"]["total"] == pytest.approx(scene.rounds[2]["untouched"]["total"], abs=1e-6)


def test_loads_differ_in_visual_tokens(small: BenchSpec, model_folder: Path) -> None:
    from vtc.eval.bench.models import subject

    found = chosen(subject(str(model_folder), layers=None, device="cpu"), replace(small, loads=None))
    assert [load.pictures for load in found] == [1, 2, 3]  # this model makes 144 tokens of a picture of any size


def test_memory_counts_from_where_it_starts() -> None:
    memory = Memory(torch.device("cpu"))
    rest = memory.start()
    if rest is None:
        pytest.skip("this system does not tell the peak of resident memory")
    block = torch.ones(64 << 18)  # 64 MiB
    peak = memory.peak()
    assert peak is not None and peak - rest >= 0.9 * block.nbytes
    del block
    assert memory.start() is not None and (again := memory.peak()) is not None and again < peak - 0.5 * (64 << 20)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"retentions": (1.5,)}, r"retention=1.5 is outside"),
        ({"batch_sizes": (0,)}, "hold no size of 1 or more"),
        ({"batch_sizes": ()}, "hold no size of 1 or more"),
        ({"new_tokens": 0}, "new-tokens=0 is too small"),
        ({"repeats": 0}, "repeats=0 is too small"),
        ({"methods": ("random", "random")}, "methods: random given twice"),
    ],
)
def test_settings_that_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises((InputError, BudgetError), match=says):
        BenchSpec(**given)


def test_methods_that_are_refused() -> None:
    with pytest.raises(UnknownName, match="unknown method 'randon'; did you mean 'random'"):
        arms(["randon"], [0.5])
    with pytest.raises(InputError, match="method 'random' has no budget; give --retentions"):
        arms(["random"], [])
    with pytest.raises(InputError, match="is a list of 2"):
        arms(["random, stride"], [0.5])
    with pytest.raises(InputError, match="downsample has no hyper-parameters"):
        arms(["downsample(side=3)"], [0.5])
    names = [arm.name for arm in arms(["random@64", "hiprune@0.5+aim(merge=false)@0.5", "stride"], [0.5])]
    assert names == ["untouched", "random@64", "hiprune@0.5+aim(merge=false)@0.5", "stride@0.5"]


@pytest.mark.parametrize("text", ["x336", "0x336", "1x", "two", "1x3x3x3"])
def test_loads_that_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="write for example 2x336"):
        Load.parse(text)


def test_a_folder_without_a_bench(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no bench \(no bench.json\)"):
        read_record(tmp_path)
    (tmp_path / BENCH).write_text("{}")
    with pytest.raises(InputError, match="is no record of a bench"):
        read_record(tmp_path)
