"""FlashAttention and flex attention: every reading and every kind of stage gives what it gives under SDPA.

Without a GPU only the kernels are emulated, by SDPA: masks, unpadding, packed sequences and all other decisions are
transformers' own. The tests marked `cuda` run the real ones.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
import transformers.masking_utils as masking
import transformers.modeling_flash_attention_utils as flash
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtc
from vtc.errors import UnsupportedModel
from vtc.method.base import CacheStage, Compressor, ModelSpec, Needs, Plan, Rows, Selection, StageView
from vtc.method.vision_readings import MeanKeys
from vtc.methods.aim.method import Importance
from vtc.testing import FixedKeep, LastRowTopK, tiny_inputs, tiny_model
from vtc.testing.contract import LIMIT, generate

FAMILIES = ["llava-clip", "llava-onevision", "qwen2.5-vl", "internvl"]
FLASH, FLEX = ["flash_attention_2", "flash_attention_3"], "flex_attention"
PROMPTS: dict[str, Any] = {
    "padded": [[4, "image", 3, "image", 5], [2, "image", 12], [9]],
    "alone": [[4, "image", 3, "image", 5]],
}
"""Alone there is no padding, so that flash kernels get no mask at all and look for packed sequences."""


# --- emulation
def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    """[B, L, H, D] as a flash kernel takes them; causality is aligned to the last row."""
    mask = None
    if causal:
        mask = torch.arange(k.shape[1]) <= torch.arange(q.shape[1])[:, None] + (k.shape[1] - q.shape[1])
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    product = torch.nn.functional.scaled_dot_product_attention
    return product(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def dense(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False
) -> Tensor:
    """`flash_attn_func`."""
    return attend(q, k, v, causal, softmax_scale)


def packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
) -> Tensor:  # fmt: skip
    """`flash_attn_varlen_func`: [rows, H, D], sequences one behind the other."""
    queries, keys = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    parts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    return torch.cat([attend(a[None], b[None], c[None], causal, softmax_scale)[0] for a, b, c in parts])


def flexible(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    """`flex_attention_forward` with the mask that the block mask stands for."""
    mask = attention_mask
    if mask is not None:
        mask = create_mask(mask.mask_mod, query.shape[0], None, query.shape[2], key.shape[2], "cpu")
    product = torch.nn.functional.scaled_dot_product_attention
    grouped = query.shape[1] != key.shape[1]
    return product(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped).transpose(1, 2), None


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Any]:
    """Builds a tiny model that runs under an implementation whose kernels are emulated."""

    def build(name: str, implementation: str) -> Any:
        model = tiny_model(name)
        if implementation == FLEX:
            if not type(model)._supports_flex_attn:
                pytest.skip("transformers runs this family without flex attention")
            monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, FLEX, flexible)
            monkeypatch.setattr(
                masking, "create_block_mask", lambda **given: create_block_mask(**{**given, "_compile": False})
            )
        else:
            process = flash._lazy_define_process_function(packed)
            for place, function in {
                "_loaded_implementation": implementation, "_flash_fn": dense, "_flash_varlen_fn": packed,
                "_pad_fn": flash._pad_input, "_unpad_fn": flash._unpad_input, "_process_flash_kwargs_fn": process,
                "_process_with_kvcache_kwargs_fn": dict,
            }.items():  # fmt: skip
                monkeypatch.setattr(flash, place, function)
        for module in model.modules():
            if hasattr(module, "config"):  # set_attn_implementation asks for the package
                module.config._attn_implementation_internal = implementation
        return model

    return build


# --- what is compared
@dataclass(frozen=True)
class Reader(Compressor):
    """Reads everything that can be read, at every stage, and drops a third of the tokens at each."""

    views: list[StageView] = field(default_factory=list, compare=False)

    name: ClassVar[str] = "reader"

    @property
    def needs_budget(self) -> bool:
        return False

    def plan(self, model: ModelSpec) -> Plan:
        classes = (Rows.CLS, Rows.CLS_PATCHES, Rows.CLS_LOGITS) if model.has_cls else ()
        vision = dict.fromkeys((0, model.feature_layer), (*classes, Rows.RECEIVED, Rows.KEYS, MeanKeys()))
        llm = {0: (Rows.LAST, Rows.GROUP_SUMS), 1: (Rows.LAST, Rows.LAST_AHEAD, Importance())}
        return Plan((0, 1, 2, CacheStage(3)), Needs(vision, llm), "preserve")

    def select(self, view: StageView) -> Selection:
        self.views.append(view)
        return Selection(view.items.token % (3 + self.plan(view.model).stages.index(view.stage)) > 0)


def seen(model: Any, layout: Any, name: str) -> tuple[list[Tensor], Tensor]:
    """All readings at all stages, and the logits of a generation."""
    method = Reader()
    _, logits = generate(model, tiny_inputs(name, layout, model=model), vtc.compress(model, method), 3)
    found = []
    for view in method.views:
        found += [view.vision_attention(*key) for key in view.vision_rows]
        found += [view.llm_attention(*key) for key in view.llm_rows]
    return found, logits


@pytest.mark.parametrize("layout", PROMPTS)
@pytest.mark.parametrize(
    ("name", "implementation"),
    [("llava-clip", FLASH[1]), *((name, kernel) for kernel in (FLASH[0], FLEX) for name in FAMILIES)],
)
def test_every_reading_and_every_stage_equal_those_under_sdpa(
    name: str, implementation: str, layout: str, emulated: Callable[[str, str], Any]
) -> None:
    expected, expected_logits = seen(tiny_model(name), PROMPTS[layout], name)
    found, logits = seen(emulated(name, implementation), PROMPTS[layout], name)
    assert len(found) == len(expected) > 20
    for value, other in zip(found, expected, strict=True):
        assert value.shape == other.shape
        assert float((value - other).abs().max()) <= LIMIT * max(1.0, float(other.abs().max()))
    assert float((logits - expected_logits).abs().max()) <= LIMIT


@pytest.mark.parametrize(
    "probe",
    [
        FixedKeep(at=(0, 1, 3)),
        FixedKeep(at=(1, CacheStage(2))),
        FixedKeep(at=(0, 1, 2, 3), skips=(1, 3)),
        LastRowTopK(),
    ],
    ids=str,
)
@pytest.mark.parametrize("implementation", [FLASH[0], FLEX])
@pytest.mark.parametrize("name", FAMILIES)
def test_pruning_without_a_cache_and_with_compact_positions(
    name: str, implementation: str, probe: Any, emulated: Callable[[str, str], Any]
) -> None:
    """Where neither mask nor cache would tell a flash kernel that gapped positions are one sequence."""
    models, budget = (
        (tiny_model(name), emulated(name, implementation)),
        {"retention": 0.7} if probe.needs_budget else {},
    )
    inputs = tiny_inputs(name, PROMPTS["alone"], model=models[0])
    for options in ({"use_cache": False}, {}):
        positions = "preserve" if options else "compact"
        logits = [
            generate(each, inputs, vtc.compress(each, probe, positions=positions, **budget), 2, **options)[1]
            for each in models
        ]
        assert float((logits[1] - logits[0]).abs().max()) <= LIMIT


@pytest.mark.parametrize("layout", PROMPTS)
@pytest.mark.parametrize("name", ["llava-clip", "llava-onevision"])
def test_windows_of_visual_attention_are_those_under_sdpa(
    name: str, layout: str, emulated: Callable[[str, str], Any]
) -> None:
    """From a layer on, and where the model is given the finished mask."""
    for layer in (0, 16):
        logits = []
        for model in (tiny_model(name), emulated(name, FLEX)):
            handle = vtc.compress(model, "visual_window", window=3, layer=layer)
            logits.append(generate(model, tiny_inputs(name, PROMPTS[layout], model=model), handle, 2)[1])
        assert float((logits[1] - logits[0]).abs().max()) <= LIMIT


@pytest.mark.parametrize("implementation", [FLASH[0], FLEX])
def test_the_emulation_is_what_runs(
    implementation: str, emulated: Callable[[str, str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = emulated("llava-clip", implementation)
    plain = tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", PROMPTS["padded"], model=plain)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        assert float((model(**inputs).logits - plain(**inputs).logits)[real].abs().max()) <= LIMIT

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("emulated kernel")

    if implementation == FLEX:
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, FLEX, fails)
    else:
        monkeypatch.setattr(flash, "_flash_fn", fails)
    with torch.no_grad(), pytest.raises(RuntimeError, match="emulated kernel"):
        model(**inputs)


@pytest.mark.parametrize("implementation", [*FLASH, FLEX])
def test_eager_rows_stay_refused_by_name(implementation: str, emulated: Callable[[str, str], Any]) -> None:
    """A tower under eager attention below a language model with a kernel."""
    model = emulated("llava-clip", implementation)
    model.model.vision_tower.config._attn_implementation_internal = "eager"
    with pytest.raises(UnsupportedModel, match="CLIPAttention runs eager attention"):
        vtc.compress(model, "vtc_cls", retention=0.5)


# --- the real kernels
def with_wide_heads(model: Any) -> Any:
    """The same weights in fewer heads of 16 numbers and more, which is the least that flex attention's kernel takes."""
    for module in model.modules():
        width = getattr(module, "head_dim", 16)
        if width < 16 and hasattr(module, "config"):
            module.num_heads, module.head_dim = module.num_heads * width // 16, 16
            module.scale = 16**-0.5
            module.config.num_attention_heads = module.num_heads
    return model


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch's compiler itself
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("implementation", [*FLASH, FLEX])
@pytest.mark.parametrize("name", FAMILIES)
def test_real_kernels_read_what_sdpa_reads(name: str, implementation: str) -> None:
    """In bfloat16, where kernels round differently: readings are compared with a tolerance of that precision."""
    package = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}.get(implementation)
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    model, other = (with_wide_heads(tiny_model(name)).to("cuda", torch.bfloat16) for _ in range(2))
    if implementation == FLEX and not type(model)._supports_flex_attn:
        pytest.skip("transformers runs this family without flex attention")
    model.set_attn_implementation(implementation)
    inputs = {key: value.cuda() for key, value in tiny_inputs(name, PROMPTS["padded"]).items()}
    rows = []
    for each in (other, model):
        method = Reader()
        with vtc.compress(each, method), torch.no_grad():
            each(**inputs)
        first = method.views[0]
        rows.append([first.vision_attention(*key).float() for key in first.vision_rows])
    for expected, found in zip(*rows, strict=True):
        assert float((found - expected).abs().max()) <= 0.05 * float(expected.abs().max())
