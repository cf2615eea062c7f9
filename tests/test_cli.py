"""The command line as a user meets it: exit status, stdout, stderr."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from vtc.cli.main import main
from vtc.method.registry import METHODS

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Finished:
    """A command that ended."""

    returncode: int
    stdout: str
    stderr: str


def vtc(*arguments: str) -> Finished:
    """Run the command in this process: a new one imports torch for seconds."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", ["vtc", *arguments])
        with redirect_stderr(io.StringIO()) as errors:
            try:
                main()
                status = 0
            except SystemExit as ended:
                status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return Finished(status, out.getvalue(), errors.getvalue())


def refused(result: Finished, *words: str) -> None:
    """One line on stderr that holds all `words`, nothing on stdout, exit status 2, no traceback."""
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("vtc: error:")]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0], lines[0]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    from vtc.eval.tiny.scenes import make_scene

    file = tmp_path / "scene.png"
    Image.fromarray(make_scene(3, "check").image).save(file)
    return file


def test_methods_json_is_alone_on_stdout() -> None:
    result = vtc("methods", "--json")
    assert result.returncode == 0, result.stderr
    entries = json.loads(result.stdout)
    assert {"random", "stride", "pool", "vtc_cls"} <= {entry["name"] for entry in entries}
    for entry in entries:
        assert {"name", "stages", "needs", "trained", "families"} <= set(entry)
        assert "llava" in entry["families"]
        assert entry["stages"]


def test_methods_are_filtered() -> None:
    chosen = json.loads(
        vtc("methods", "vq*", "--untrained", "--stage", "pre_llm", "--family", "llava", "--json").stdout
    )
    assert [entry["name"] for entry in chosen] == ["vqtoken_codebook"]
    refused(vtc("methods", "--stage", "cahce"), "unknown stage 'cahce'; did you mean 'cache'")


def test_methods_table_and_long_text() -> None:
    assert "vtc_cls" in vtc("methods").stdout
    assert "2412.05819" not in vtc("methods").stdout
    assert "Departures from the paper" in vtc("methods", "--long").stdout


def test_the_document_about_methods_is_the_commands_output() -> None:
    document = Path(__file__).parents[1] / "docs" / "methods.md"
    assert document.read_text(encoding="utf-8") == vtc("methods", "--markdown").stdout, "run `make results`"


@pytest.mark.parametrize("name", METHODS.names())
def test_every_published_method_says_where_it_departs(name: str) -> None:
    """Baselines of our own have no paper to depart from."""
    text = (METHODS.get(name).__doc__ or "").replace("\n", " ")
    assert "Departures from the paper and its code:" in text or name in ("random", "stride", "pool")


def test_models_lists_the_embedded_model_and_every_family() -> None:
    entries = json.loads(vtc("models", "--json").stdout)
    kinds = {entry["name"]: entry["kind"] for entry in entries}
    assert kinds["tiny-llava"] == "embedded"
    assert kinds["llava"] == "family"
    assert kinds["tiny-clip"] == kinds["clip"] == kinds["open_clip"] == "encoder"
    assert {entry["name"]: entry["modalities"] for entry in entries}["tiny-onevision"] == ["image", "video"]


def test_generate_answers_and_reports_tokens(image: Path) -> None:
    plain = vtc("generate", "--image", str(image), "--prompt", "how many red objects are there?")
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.strip()
    assert "144 of 144 visual tokens" in plain.stderr
    arguments = ["--method", "vtc_cls", "--retention", "0.25", "--set", "layers=2", "--json"]
    short = vtc("generate", "--image", str(image), "--prompt", "is there a red star?", *arguments)
    assert short.returncode == 0, short.stderr
    entry = json.loads(short.stdout)
    assert (entry["visual_tokens_in"], entry["visual_tokens_kept"]) == (144, 36)
    assert entry["text"] in ("yes", "no")


def test_generate_takes_several_images(image: Path) -> None:
    arguments = ["--image", str(image), "--image", str(image), "--method", "stride", "--keep", "10", "--json"]
    result = vtc("generate", "--prompt", "is there a red star?", *arguments)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["visual_tokens_kept"] == 20


def test_generate_takes_methods_together(image: Path) -> None:
    method = "hiprune@0.5+mustdrop(merge=off,filter=off)"
    result = vtc("generate", "--image", str(image), "--prompt", "is there a red star?", "--method", method, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["visual_tokens_kept"] == 72


def test_generate_refuses_bad_images(tmp_path: Path, image: Path) -> None:
    refused(vtc("generate", "--image", str(tmp_path / "none.png"), "--prompt", "x"), "none.png", "does not exist")
    broken = tmp_path / "broken.png"
    broken.write_bytes(image.read_bytes()[:300])
    refused(vtc("generate", "--image", str(broken), "--prompt", "x"), "broken.png", "cannot be read")
    text = tmp_path / "text.png"
    text.write_text("no picture")
    refused(vtc("generate", "--image", str(text), "--prompt", "x"), "text.png", "cannot be read")
    refused(vtc("generate", "--image", str(tmp_path), "--prompt", "x"), repr(str(tmp_path)), "is a folder")
    address = "http://127.0.0.1:1/a.png"
    refused(vtc("generate", "--image", address, "--prompt", "x"), repr(address), "cannot be fetched")
    frames = [Image.new("RGB", (8, 8), (40 * number, 0, 0)) for number in range(3)]
    frames[0].save(moving := tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    refused(vtc("generate", "--image", str(moving), "--prompt", "x"), "moving.gif", "3 frames", "--video")
    refused(vtc("generate", "--video", str(moving), "--prompt", "x"), "llava models take none")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "vtc-cls", "--retention", "0.5"], ["'vtc-cls'", "did you mean 'vtc_cls'"]),
        (["--method", "vtc_cls"], ["neither", "retention=0.25"]),
        (["--method", "vtc_cls", "--retention", "0.5", "--keep", "3"], ["both"]),
        (["--method", "vtc_cls", "--retention", "1.5"], ["1.5", "(0, 1]"]),
        (["--method", "vtc_cls", "--keep", "0"], ["keep=0"]),
        (["--method", "vtc_cls", "--retention", "0.5", "--set", "layer=3"], ["'layer'", "did you mean"]),
        (["--method", "vtc_cls", "--retention", "0.5", "--set", "layers"], ["name=value"]),
        (["--method", "vtc_cls", "--retention", "0.5", "--set", "layers=two"], ["'two'", "is not a whole number"]),
        (["--retention", "0.5"], ["--method"]),
        (["--method", "random@0.5", "--retention", "0.5"], ["own budget"]),
        (["--method", "random,stride", "--retention", "0.5"], ["list of 2"]),
        (["--method", "hiprune+aim(merge=false)", "--retention", "0.5"], ["hiprune@0.5+aim@0.5"]),
        (["--method", "random@0.5+mustdrop(merge=off,filter=off)", "--set", "seed=1"], ["random(name=value)"]),
        (["--plugin", "nowhere.py", "--method", "random", "--keep", "3"], ["nowhere.py"]),
        (["--model", "x" * 300], ["too long"]),
        (["--method", "random", "--retention", "0.5", "--positions", "keep"], ["'keep'", "preserve"]),
        (["--model", "no/such-model"], ["no/such-model"]),
        (["--dtype", "float99"], ["float99"]),
        (["--device", "nonsense"], ["device 'nonsense' cannot be used here", "cpu"]),
        (["--device", "meta"], ["device 'meta'"]),
        (["--prompt", "what is <image>?"], ["the prompt holds '<image>'"]),
    ],
)
def test_generate_refuses_bad_arguments(image: Path, arguments: list[str], words: list[str]) -> None:
    refused(vtc("generate", "--image", str(image), "--prompt", "x", *arguments), *words)


def test_unsupported_checkpoint_is_named_before_weights_are_read(tmp_path: Path, image: Path) -> None:
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    result = vtc("generate", "--model", str(folder), "--image", str(image), "--prompt", "x")
    refused(result, "BertModel", "LlavaForConditionalGeneration")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = vtc("--debug", "generate", "--image", str(tmp_path / "none.png"), "--prompt", "x")
    assert result.returncode == 2
    assert "Traceback" in result.stderr


def test_unknown_command_fails_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-c", "from vtc.cli.main import main; main()", "methodes"]
    assert subprocess.run(command, capture_output=True, timeout=300, check=False).returncode == 2
