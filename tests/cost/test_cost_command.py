"""`vtc cost`: built-in shapes, configurations, schedules, translation and the published rows, as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vtc.app.cost_report import Prompt, check_report, load_shape, token_counts_of, translated
from vtc.cli.main import app
from vtc.cost.conventions import CONVENTIONS
from vtc.cost.published import published
from vtc.cost.token_counts import constant
from vtc.errors import VTCError


def asked(*arguments: str) -> Any:
    result = CliRunner().invoke(app, ["cost", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def by_name(data: Any) -> dict[str, Any]:
    return {entry["name"]: entry for entry in data["conventions"]}


def test_one_prompt_under_all_conventions() -> None:
    data = asked("llava-1.5-7b", "--text", "36", "--layers", "3:50%", "--new-tokens", "5")
    found = by_name(data)
    assert list(found) == [*CONVENTIONS, "exact"]
    assert found["ffn2"]["share"] == pytest.approx(0.56656, abs=5e-6)
    assert found["ffn3_visual"]["untouched"] == pytest.approx(3.81715e12, rel=1e-5)
    assert data["mean_visual"] == (3 * 576 + 29 * 288) / 32
    parts = data["exact"]
    assert (
        parts["prefill"]
        == sum(parts[name] for name in ("tower", "projector", "llm", "head"))
        == found["exact"]["flops"]
    )
    assert parts["total"] == parts["prefill"] + parts["decode"] and parts["decode"] > 0
    assert parts["kv_bytes"] == 2 * 4096 * 2 * (3 * 612 + 29 * 324)
    assert parts["kv_bytes"] < data["exact_untouched"]["kv_bytes"]
    estimates = [name for name in parts if name.startswith("estimate_")]
    assert estimates == ["estimate_activation_bytes", "estimate_weight_bytes"]
    assert 0 < data["estimate_seconds"]["prefill"] < data["estimate_seconds_untouched"]["prefill"]
    assert data["estimate_seconds"]["decode"] > 0


def test_a_batch_is_so_many_prompts_and_reads_weights_once() -> None:
    one, four = asked("llava-1.5-7b", "--keep", "64"), asked("llava-1.5-7b", "--keep", "64", "--batch", "4")
    assert by_name(four)["ffn2"]["flops"] == 4 * by_name(one)["ffn2"]["flops"]
    for name in ("prefill", "kv_bytes", "estimate_activation_bytes"):
        assert four["exact"][name] == 4 * one["exact"][name], name
    assert four["exact"]["estimate_weight_bytes"] == one["exact"]["estimate_weight_bytes"]
    assert four["estimate_seconds"]["prefill"] < 4 * one["estimate_seconds"]["prefill"]
    assert four["estimate_seconds"]["prefill_llmviewer"] is None


def test_embedded_models_and_configurations(tmp_path: Path) -> None:
    """A folder, its config.json and the embedded model of the same configuration are the same."""
    from vtc.embedded import model_path

    (tmp_path / "config.json").write_text((model_path("tiny-llava") / "config.json").read_text())
    found = [
        asked(name, "--retention", "0.25") for name in ("tiny-llava", str(tmp_path), str(tmp_path / "config.json"))
    ]
    assert found[0]["exact"] == found[1]["exact"] == found[2]["exact"]
    assert (found[0]["visual"], found[0]["mean_visual"]) == (144, 36)


def test_pictures_of_any_size_and_frames() -> None:
    """Qwen's tower runs on the patches of the tokens; frames are sequences of their own."""
    one, eight = (asked("qwen2-vl-7b", "--visual", "2048", *more)["exact"] for more in ((), ("--crops", "8")))
    assert one["projector"] == eight["projector"]
    assert one["tower"] > eight["tower"]  # attention inside frames alone
    assert one["llm"] == eight["llm"]


def test_translation() -> None:
    """One number of PyramidDrop's table, in the other conventions at the tokens it stands for."""
    data = translated(published("llava-1.5-7b"), 0, "ffn3_visual=3.81715T")
    assert data["visual"] == pytest.approx(576, abs=0.01)
    found = by_name(data)
    assert found["ffn2"]["flops"] == pytest.approx(2.986e12, rel=1e-3)
    assert found["ffn3_x2"]["flops"] == pytest.approx(8.504e12, rel=1e-3)
    assert found["llmviewer"]["flops"] == pytest.approx(7.637e12, rel=1e-3)
    back = translated(published("llava-1.5-7b"), 0, f"exact={found['exact']['flops']}")
    assert back["visual"] == pytest.approx(576, abs=1)


def test_published_rows_agree() -> None:
    found = asked("--check")
    assert len(found) > 80 and all(row["agrees"] for row in found)
    assert {row["source"].split(",")[0] for row in found} == {
        "DivPrune", "FastV", "PyramidDrop", "ShortV", "GlobalCom2", "AIM", "SparseVLM",
    }  # fmt: skip
    assert all({"printed", "ours", "tolerance", "convention", "what"} <= set(row) for row in check_report())


def test_a_row_that_differs_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {**check_report()[0], "agrees": False}
    monkeypatch.setattr("vtc.app.cost_report.check_report", lambda: [wrong])
    result = CliRunner().invoke(app, ["cost", "--check"])
    assert result.exit_code == 1 and "DIFFERS" in result.stdout and "0 of 1" in result.stdout


def test_text_output_calls_estimates_estimates() -> None:
    result = CliRunner().invoke(app, ["cost", "llava-next-7b", "--keep", "640", "--new-tokens", "3"])
    assert result.exit_code == 0
    lines = [
        line for line in result.stdout.splitlines() if ", ms on" in line or "weights" in line or "activations" in line
    ]
    assert lines and all("estimate" in line for line in lines)
    listed = CliRunner().invoke(app, ["cost", "--models"]).stdout
    assert "liuhaotian/llava-v1.5-7b" in listed
    assert "visual tokens in every layer" in CliRunner().invoke(app, ["cost", "--translate", "ffn2=3T"]).stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lava-1.5-7b"], "did you mean 'llava-1.5-7b'"),
        (["llava-1.5-7b", "--keep", "5", "--retention", "0.5"], "write one of them"),
        (["llava-1.5-7b", "--retention", "1.5"], "outside (0, 1]"),
        (["llava-1.5-7b", "--layers", "99:5"], "no rising list"),
        (["llava-1.5-7b", "--hardware", "a100"], "unknown hardware"),
        (["llava-1.5-7b", "--batch", "0"], "batch=0 is too small"),
        (["llava-1.5-7b", "--bytes", "3"], "no size of a number"),
        (["llava-1.5-7b", "--visual", "0", "--text", "0"], "no tokens"),
        (["llava-1.5-7b", "--crops", "0"], "crops=0"),
        (["--translate", "ffn3_visual"], "no published number"),
        (["--translate", "ffn9=3T"], "unknown convention 'ffn9'"),
        (["--translate", "ffn3_x2=1G"], "no prompt has it"),
        (["--check", "--models"], "ask one of them"),
    ],
)
def test_bad_input_is_refused(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["cost", *arguments])
    assert isinstance(result.exception, VTCError) and words in str(result.exception)


def test_a_broken_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(VTCError, match="no configuration can be read"):
        load_shape(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(VTCError, match="LlamaForCausalLM is not supported"):
        load_shape(str(tmp_path))


def test_a_prompt_without_pictures() -> None:
    shape = published("llava-1.5-7b")
    work = Prompt(0, 10, constant(32, 0)).work(shape, token_counts_of(32, 0))
    assert work.encoded.crops == 0 and work.visual.mean == 0
