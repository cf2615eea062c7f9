"""Conventions, roofline and cache against published numbers and vectors that were computed from the formulas."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from vtc import adapters
from vtc.cost.conventions import CONVENTIONS, convention
from vtc.cost.exact import Work, cost, llm_operations, operators
from vtc.cost.published import PUBLISHED, QWEN2_7B, VICUNA_7B, VICUNA_13B, published
from vtc.cost.reference import halving, rows, sparsevlm
from vtc.cost.roofline import HARDWARE, hardware, seconds, viewer_operators
from vtc.cost.shapes import LLMShape, ModelShape
from vtc.cost.token_counts import TokenCounts, constant, from_steps, parse
from vtc.errors import InputError, UnknownName

A7, A13 = VICUNA_7B, VICUNA_13B
VECTORS = {
    "a1": ("ffn2", A7, constant(1, 612), 99.3275e9),
    "a2": ("ffn2", A13, constant(1, 612), 154.6415e9),
    "b1": ("ffn3_visual", A7, constant(32, 576), 3.81715e12),
    "b2": ("ffn3_visual", A7, halving(576, 0.5), 1.77740e12),
    "b3": ("ffn3_visual", A7, halving(2880, 0.5), 9.46455e12),
    "b4": ("ffn3_visual", A7, from_steps([(0, 576), (2, 288)], 32), 2.00748e12),
    "c1": ("ffn3_x2", A7, constant(32, 576), 8.50404e12),
    "c2": ("ffn3_x2", A7, from_steps([(0, 576), (2, 288)], 32), 4.86657e12),
    "c3": ("ffn3_x2", A7, from_steps([(0, 576), (16, 0)], 32), 4.66756e12),
    "c4": ("ffn3_x2", A13, constant(40, 2880), 81.80571e12),
}
ROOFLINE = {
    "d1": ("a100-40g", A7, constant(32, 616), 8.1809, 29.297, 322.961),
    "d2": ("a100-40g", A7, constant(32, 2880), 41.6998, 170.705, 1509.949),
    "d3": ("a100-80g", A13, constant(40, 2880), 79.9535, 295.143, 2359.296),
    "d4": ("a100-40g", QWEN2_7B, constant(28, 6372), 99.6270, 439.578, 365.396),
    "d5": ("a100-40g", QWEN2_7B, constant(28, 18532), 381.0893, 2186.041, 1062.699),
    "d6": ("a100-40g", A7, from_steps([(0, 616), (1, 184)], 32), 2.5823, 10.344, 103.547),
}


@pytest.mark.parametrize("case", VECTORS)
def test_conventions(case: str) -> None:
    name, llm, visual, value = VECTORS[case]
    assert convention(name).operations(llm, visual, 0) == pytest.approx(value, rel=1e-5)


def test_ratio_of_fastv() -> None:
    """Vector a3."""
    full, pruned = constant(32, 612), from_steps([(0, 612), (3, 324)], 32)
    ffn2 = convention("ffn2")
    assert ffn2.operations(A7, pruned, 0) / ffn2.operations(A7, full, 0) == pytest.approx(0.56656, abs=5e-6)


@pytest.mark.parametrize("case", ROOFLINE)
def test_llmviewer(case: str) -> None:
    device, llm, entering, tera, ms, cache = ROOFLINE[case]
    found = list(viewer_operators(llm, entering))
    assert convention("llmviewer").operations(llm, entering, 0) == sum(each.operations for each in found)
    assert sum(each.operations for each in found) / 1e12 == pytest.approx(tera, abs=5e-5)
    assert 1000 * seconds(found, HARDWARE[device]) == pytest.approx(ms, abs=5e-4)
    assert sum(llm.kv_bytes(tokens) for _, tokens in entering.each()) / 1e6 == pytest.approx(cache, abs=5e-4)


def test_the_formula_of_llmviewer_is_what_its_operators_sum_to() -> None:
    n, d, m, layers = 100, 4096, 11008, 32
    per_layer = 2 * n * (4 * d**2 + 3 * d * m) + 4 * n**2 * d + 5 * 32 * n**2 + 18 * n * d
    assert convention("llmviewer").operations(A7, constant(layers, n), 0) == layers * per_layer + d * 32000


def test_cache() -> None:
    """Vectors e1 and e2, and a row of section H: two times keys of all layers."""
    assert A7.layers * A7.kv_bytes(576) == 301_989_888
    assert QWEN2_7B.layers * QWEN2_7B.kv_bytes(1000) == 57_344_000


def test_tokens_behind_and_entering_the_layers_of_sparsevlm() -> None:
    """Vector f1, and the two other targets."""
    found = {kept: [each.mean for each in sparsevlm(kept)] for kept in ((300, 200, 110), (303, 110, 36), (66, 30, 17))}
    assert list(found.values()) == [[206.5, 192.03125], [145.40625, 128.625], [82.25, 64.8125]]


REFERENCE = list(rows())


@pytest.mark.parametrize("row", REFERENCE, ids=[f"{row.source}: {row.what}" for row in REFERENCE])
def test_published_rows(row: object) -> None:
    assert row.agrees, row  # type: ignore[attr-defined]


def test_reference_values_of_section_four() -> None:
    for visual, ffn2, ffn3, viewer in (
        (576, 2.986, 3.817, 7.637), (192, 0.976, 1.253, 2.507), (128, 0.649, 0.833, 1.667), (64, 0.323, 0.416, 0.831),
        (2880, 16.670, 20.825, 41.700), (640, 3.329, 4.252, 8.508), (320, 1.638, 2.099, 4.200), 
        (160, 0.812, 1.043, 2.086),
    ):  # fmt: skip
        entering = constant(32, visual)
        found = [CONVENTIONS[name].operations(A7, entering, 0) / 1e12 for name in ("ffn2", "ffn3_visual", "llmviewer")]
        assert found == pytest.approx([ffn2, ffn3, viewer], abs=6e-4)


def test_text_counts_as_the_convention_says() -> None:
    visual = constant(32, 100)
    for name, counted in (("ffn2", 130), ("ffn3_visual", 100), ("ffn3_x2", 164), ("ffn3_seq", 130), ("llmviewer", 130)):
        same = convention(name).count(A7, constant(32, counted))
        assert convention(name).operations(A7, visual, 30) == same, name


def test_schedules() -> None:
    assert parse("0:100%,8:50%,16:25%", 32, 576) == TokenCounts(((8, 576), (8, 288), (16, 144)))
    assert parse("2:128", 32, 576).mean == pytest.approx((2 * 576 + 30 * 128) / 32)
    for text in ("2", "2:x", "a:3", "40:5", "2:600", "4:5,2:4", ""):
        with pytest.raises(InputError):
            parse(text, 32, 576)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UnknownName, match="did you mean 'ffn2'"):
        convention("fnn2")
    with pytest.raises(UnknownName, match="a100"):
        hardware("a100")
    with pytest.raises(UnknownName, match="llava-1"):
        published("llava-1.5-7")


KINDS = {
    "llava-1.5": "Llava", "llava-next": "LlavaNext", "llava-onevision": "LlavaOnevision", "qwen2-vl": "Qwen2VL",
    "qwen2.5-vl": "Qwen2_5_VL", "qwen3-vl": "Qwen3VL", "internvl2.5": "InternVL", "internvl3": "InternVL",
}  # fmt: skip


def configured(shape: ModelShape) -> Any:
    """A transformers configuration with the sizes of a published language model; the tower's are the defaults."""
    kind, llm, tower = KINDS[shape.name.rsplit("-", 1)[0]], shape.llm, shape.tower
    parts: dict[str, Any] = {
        "text_config": {
            "hidden_size": llm.hidden, "intermediate_size": llm.intermediate, "num_hidden_layers": llm.layers,
            "num_attention_heads": llm.heads, "num_key_value_heads": llm.kv_heads, "vocab_size": llm.vocabulary,
            "head_dim": llm.head_dim, "model_type": "llama" if llm.kind == "internlm2" else llm.kind,
        }
    }  # fmt: skip
    if kind.startswith("Qwen"):
        del parts["text_config"]["model_type"]
    if kind in ("Qwen2_5_VL", "Qwen3VL"):  # its defaults are of no checkpoint; towers of two sizes
        parts["vision_config"] = {
            "depth": tower.layers, "hidden_size": tower.hidden, "intermediate_size": tower.intermediate
        }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**parts)
    config.architectures = [f"{kind}ForConditionalGeneration"]
    return config


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_are_what_the_adapters_read_of_such_configurations(name: str) -> None:
    """The towers' remaining sizes are the defaults of transformers, which are those of published checkpoints."""
    ours, read = PUBLISHED[name], adapters.shape_of(configured(PUBLISHED[name]))
    assert read.tower == ours.tower
    assert (read.projector, read.crop_patches, read.window) == (ours.projector, ours.crop_patches, ours.window)
    assert read.visual == ours.visual
    for size in ("hidden", "intermediate", "layers", "heads", "kv_heads", "head_dim", "vocabulary", "experts"):
        assert getattr(read.llm, size) == getattr(ours.llm, size), size


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llava-1.5-7b", 7.06), ("llava-1.5-13b", 13.35), ("qwen2-vl-2b", 2.21), ("qwen2.5-vl-7b", 8.29),
     ("internvl3-8b", 7.94)],
)  # fmt: skip
def test_weights_are_those_of_the_checkpoints(name: str, billions: float) -> None:
    """Parameters as the model cards count them, to within embeddings that are not tied, biases and norms."""
    shape = published(name)
    work = Work(constant(shape.llm.layers, shape.visual), 60, shape.encoded(shape.visual))
    assert cost(shape, work).weight_bytes / 2e9 == pytest.approx(billions, rel=0.08)


def test_the_roofline_of_what_runs() -> None:
    """Never faster than computing at the peak, operations are those of `cost`, and fewer tokens take less time."""
    shape, device = published("llava-1.5-7b"), hardware("a100-80g")
    times = []
    for visual in (576, 128):
        work = Work(constant(32, visual), 60, shape.encoded(576))
        found = list(operators(shape, work))
        assert sum(each.operations for each in found) == pytest.approx(cost(shape, work).prefill)
        times.append(seconds(found, device))
        assert times[-1] >= cost(shape, work).prefill / device.peak
    assert times[1] < times[0]


def test_attention_is_half_as_wide_as_the_hidden_size_says_where_heads_are_narrow() -> None:
    """`exact` uses the heads' own width, the papers' formulas the hidden size."""
    narrow = LLMShape(64, 96, 1, 2, 1, 16, 10)
    n = 8
    linear = 2 * n * (64 * 32 + 2 * 64 * 16 + 32 * 64 + 3 * 64 * 96)
    assert llm_operations(narrow, constant(1, n)) == linear + 4 * n * n * 32
