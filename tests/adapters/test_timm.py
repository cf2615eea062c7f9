"""timm's VisionTransformer: dropped patches are masked ones in all its forms, and what is refused by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import open_clip
import pytest
import timm.models.deit
import timm.models.vision_transformer as vit
import torch
from timm.layers import AttentionPoolLatent, PatchEmbed
from torch import Tensor
from torch.nn import functional

import vtc
from vtc import adapters
from vtc.adapters.timm import TimmEncoder
from vtc.errors import UnsupportedCall, UnsupportedMethod, UnsupportedModel
from vtc.method.base import Compressor, EncoderStage, ModelSpec, Needs, Plan, Rows, Selection, StageView
from vtc.testing.encoders import OPEN_TEXT, TIMM, build, encode, pixels

FORMS: dict[str, dict[str, Any]] = {
    "class token": {},
    "class token left out of positions": {"no_embed_class": True, "reg_tokens": 1, "pre_norm": True},
    "registers alone": {"class_token": False, "reg_tokens": 3, "global_pool": "avg"},
    "norm of queries and keys": {"qk_norm": True, "init_values": 0.5},
    "norm of the attention's output": {"scale_attn_norm": True, "scale_mlp_norm": True, "qkv_bias": False},
    "attention pool": {"global_pool": "map", "class_token": False},
    "attention pool of patches alone": {"global_pool": "map", "reg_tokens": 2},
    "attention pool of all rows": {"global_pool": "map", "reg_tokens": 2, "pool_include_prefix": True},
    "norms behind": {"block_fn": vit.ResPostBlock},
    "images of any size": {"dynamic_img_size": True},
    "images of any size, padded": {"dynamic_img_size": True, "dynamic_img_pad": True},
}


def tiny(cls: Any = vit.VisionTransformer, **form: Any) -> Any:
    """A tower with random weights, large enough ones for attention to be uneven."""
    torch.manual_seed(5)
    model = cls(**{**TIMM, **form})
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.2)
    return model.eval()


def gone(stage: int, crop: Tensor, token: Tensor) -> Tensor:
    """Which tokens a stage drops: not equally many in each crop."""
    return token % (stage + crop + 2) == 0


@dataclass(frozen=True)
class Uneven(Compressor):
    """Drops at two stages what `gone` says, by the places that tokens had at first."""

    at: tuple[int, ...] = (1, 2)
    needs: Needs = field(default_factory=Needs)
    views: list[StageView] = field(default_factory=list, compare=False)

    name: ClassVar[str] = "uneven"

    @property
    def needs_budget(self) -> bool:
        return False

    def plan(self, model: ModelSpec) -> Plan:
        return Plan(tuple(map(EncoderStage, self.at)), self.needs, "compact")

    def select(self, view: StageView) -> Selection:
        self.views.append(view)
        assert isinstance(view.stage, EncoderStage)
        crop = torch.arange(len(view.items))[:, None]
        return Selection(view.items.mask & ~gone(view.stage.layer, crop, view.items.token))


def masked(model: Any, images: Tensor, at: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The untouched model whose later blocks do not see what is dropped: pooled, last rows, and which are left."""
    lead, last = model.num_prefix_tokens, list[Tensor]()
    rows, columns = (-(-side // 8) for side in images.shape[2:])
    token, crop = torch.arange(rows * columns), torch.arange(len(images))[:, None]

    def bias(layer: int) -> tuple[Tensor, Tensor]:
        left = torch.ones(len(images), len(token), dtype=torch.bool)
        for stage in at:
            left = left & ~(gone(stage, crop, token) & (stage <= layer))
        seen = functional.pad(left, (lead, 0), value=True)
        return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[:, None, None], seen

    hooks = [model.blocks[-1].register_forward_hook(lambda module, args, output: last.append(output))]
    for layer, block in enumerate(model.blocks):
        mask = bias(layer)[0]
        hooks.append(
            block.attn.register_forward_pre_hook(
                lambda module, args, kwargs, mask=mask: (args, {**kwargs, "attn_mask": mask}), with_kwargs=True
            )
        )
    if model.attn_pool is not None:
        end = bias(len(model.blocks))[0][..., 0 if model.pool_include_prefix else lead :]
        hooks.append(
            model.attn_pool.register_forward_pre_hook(lambda module, args: (*args, end)),
        )
    pooled = model(images)
    for hook in hooks:
        hook.remove()
    return pooled, last[0], bias(len(model.blocks))[1]


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "by hand"])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_dropped_patches_are_masked_ones(form: str, fused: bool) -> None:
    """In a batch whose images keep different numbers; rows of one image where their mean is pooled."""
    model = tiny(**FORMS[form])
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    size = {"images of any size": (24, 40), "images of any size, padded": (20, 37)}.get(form, (32, 32))
    images = torch.randn(1 if model.global_pool == "avg" else 3, 3, *size)
    at, last = (0, 1, 3), list[Tensor]()
    expected, rows, left = masked(model, images, at)
    model.blocks[-1].register_forward_hook(lambda module, args, output: last.append(output))
    with vtc.compress(model, Uneven(at)) as handle:
        pooled = model(images)
    counts = left.sum(1) - model.num_prefix_tokens
    assert handle.stats.calls[0].visual_tokens_kept == tuple(counts.tolist())
    before = masked(model, images, at[:2])[2]  # stage 3 is behind the last block, the hook above saw what is before it
    found = torch.cat([found[:count] for found, count in zip(last[0], before.sum(1), strict=True)])
    assert float((found - rows[before]).abs().max()) <= 5e-5
    if model.global_pool == "avg":
        expected = model.forward_head(model.norm(rows)[left][None])
    assert len(images) == 1 or len(set(counts.tolist())) > 1
    assert float((pooled - expected).abs().max()) <= 5e-5


@torch.no_grad()
def test_towers_with_a_distillation_token() -> None:
    """Both tokens in front of the patches are pooled and stay."""
    model = tiny(timm.models.deit.VisionTransformerDistilled)
    images = pixels(2)
    expected, _, _ = masked(model, images, (1, 2))
    with vtc.compress(model, Uneven((1, 2))):
        assert float((model(images) - expected).abs().max()) <= 5e-5


@torch.no_grad()
def test_queries_and_keys_are_read_as_the_attention_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind their norms, with the mask of shorter images."""
    model, seen = tiny(qk_norm=True), list[Tensor]()
    plain = functional.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **more: Any) -> Tensor:
        logits = query @ key.mT * query.shape[-1] ** -0.5
        seen.append((logits if attn_mask is None else logits.masked_fill(~attn_mask, -torch.inf)).softmax(-1))
        return plain(query, key, value, attn_mask=attn_mask, **more)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", attend)
    method = Uneven((1, 2), Needs({1: Rows.CLS}))
    with vtc.compress(model, method):
        model(pixels(2))
    view = method.views[1]
    found, expected = view.vision_attention(1, Rows.CLS), seen[1][:, :, 0, 1:].mean(1)
    assert len(set(method.views[1].items.counts)) == 2
    for row, other, left in zip(found, expected, view.items.counts, strict=True):
        assert float((row[:left] - other[:left]).abs().max()) <= 5e-6


@torch.no_grad()
def test_models_of_open_clip_are_told_from_their_towers() -> None:
    """The text tower and the projection to it are open_clip's."""
    assert type(adapters.encoder_of(build("open_clip"))).__name__ == "OpenClipEncoder"
    model, rows, images = build("timm registers"), list[Tensor](), pixels(2)
    adapter = adapters.encoder_of(model)
    assert isinstance(adapter, TimmEncoder) and adapter.encoder is model.visual.trunk
    assert len(adapter.text_layers) == 1
    assert (adapter.shape.prefix, adapter.shape.pooling) == (3, False)
    adapter.vision_layers[-1].register_forward_hook(lambda module, args, output: rows.append(output))
    pooled = encode(model, images)
    assert float((adapter.project(rows[0][:, 0]) - pooled).abs().max()) <= 1e-6
    pooling = adapters.encoder_of(build("timm map"))
    assert pooling is not None and pooling.shape.pooling
    with pytest.raises(UnsupportedModel, match="CustomTextCLIP does not project single rows"):
        pooling.project(rows[0])
    alone = adapters.encoder_of(tiny())
    assert isinstance(alone, TimmEncoder) and alone.text_layers == ()
    with pytest.raises(UnsupportedModel, match="VisionTransformer does not project single rows"):
        alone.project(rows[0])


# --- refusals
def test_other_networks_are_refused_by_name() -> None:
    tower = {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"}
    model = open_clip.model.CustomTextCLIP(16, tower, OPEN_TEXT)
    with pytest.raises(UnsupportedModel, match=r"CustomTextCLIP with timm's ConvNeXt .* such as ViT-B-16-SigLIP"):
        vtc.compress(model, "pitome", inside=True, retention=0.5)


class Stem(PatchEmbed):
    """Patches made otherwise."""


@pytest.mark.parametrize(
    ("form", "match"),
    [
        ({"block_fn": vit.ParallelScalingBlock}, "a ParallelScalingBlock where .* has Attention"),
        ({"block_fn": vit.ParallelThingsBlock}, "a ParallelThingsBlock where .* has Attention"),
        ({"attn_layer": "diff"}, "a DiffAttention where .* has Attention"),
        ({"embed_layer": Stem}, "a Stem where .* has PatchEmbed"),
        ({"global_pool": "prr"}, "a AttentionPoolPrr where .* has AttentionPoolLatent"),
    ],
)
def test_other_parts_are_refused_by_name(form: dict[str, Any], match: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"this VisionTransformer has {match}.*; choose a model with the usual"):
        vtc.compress(tiny(**form), "pitome", inside=True, retention=0.5)


def test_calls_that_do_not_fit_are_refused() -> None:
    model, images = tiny(patch_drop_rate=0.5), pixels(1)
    with vtc.compress(model, "pitome", inside=True, retention=0.5) as handle:
        with pytest.raises(UnsupportedCall, match=r"attn_mask or is_causal was passed"):
            model(images, attn_mask=torch.ones(17, 17, dtype=torch.bool))
        with pytest.raises(UnsupportedCall, match=r"attn_mask or is_causal was passed"):
            model(images, is_causal=True)
        for name in ("forward_features", "forward_intermediates", "get_intermediate_layers"):
            with pytest.raises(UnsupportedCall, match=rf"{name}\(\) runs the layers of this encoder without"):
                getattr(model, name)(images)
        model(images)
        model.train()
        with pytest.raises(UnsupportedCall, match=r"patch dropout .* patch_drop_rate=0"):
            model(images)
        model.eval().set_grad_checkpointing()
        with pytest.raises(UnsupportedCall, match=r"checkpointing of timm .*set_grad_checkpointing\(False\)"):
            model(images)
    assert len(handle.stats.calls) == 1
    model.set_grad_checkpointing(False)
    model.forward_features(images)


def test_a_mean_over_padding_is_refused() -> None:
    model = tiny(global_pool="avg")
    with vtc.compress(model, Uneven()), pytest.raises(UnsupportedMethod, match="what timm pools is made of all of"):
        model(pixels(3))


def test_the_pool_is_the_one_that_takes_a_mask() -> None:
    """A batch goes through the attention pool of open_clip's SigLIP models, mask and all, in training as well."""
    model = build("timm map").train()
    assert isinstance(model.visual.trunk.attn_pool, AttentionPoolLatent)
    images = pixels(3).requires_grad_()
    with vtc.compress(model, Uneven()):
        model.encode_image(images)[1].square().sum().backward()
    together = images.grad
    assert together is not None and not together[[0, 2]].any()
    expected = pixels(3).requires_grad_()
    masked(model.visual.trunk, expected, (1, 2))[0][1].square().sum().backward()
    assert expected.grad is not None
    assert float((together - expected.grad).abs().max() / together.abs().max()) <= 1e-4
