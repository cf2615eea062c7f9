"""Every method's stages with their released forms."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from vtc.method.base import CacheStage, EncoderStage
from vtc.testing.released import (
    Form,
    SelectionCase,
    cache,
    clusters,
    diverse,
    encoder,
    frames,
    inside,
    merging,
    pruned,
    ranking,
    redundancy,
    segments,
    tiles,
)

Case = SelectionCase


def selection_cases() -> dict[str, SelectionCase]:
    """The cases by name: the method, and where it has several stages the stage."""
    vtc_cls = Case("vtc_cls", ranking.vtc_cls_batched, ranking.vtc_cls_loop)
    cases = (
        Case("aim (merging)", *_both(merging.aim), options={"prune": False}, wide=True, tolerance=1e-5),
        Case("aim (pruning)", ranking.last_row_batched, ranking.last_row_loop, 18, {"merge": False}, share=1 / 2),
        Case("atp", ranking.atp_batched, ranking.atp_loop, 1, {"weights": "atp-tiny-llava"}),
        Case("atp_training_free", ranking.atp_counts_batched, ranking.atp_counts_loop, 5, share=1 / 5),
        Case("cdpruner", diverse.cdpruner_batched, diverse.cdpruner_loop, wide=True, steps="kept"),
        Case("cosine_redundancy", redundancy.cosine_batched, redundancy.cosine_loop, wide=True),
        Case("dart", inside.dart_batched, inside.dart_loop, 2, wide=True),
        Case("diffrate", *_both(encoder.diffrate), EncoderStage(1), {"share": 0.0}, wide=True, tolerance=1e-5,
             one_crop=True),
        Case("divprune", diverse.divprune_batched, diverse.divprune_loop, wide=True, steps="kept"),
        Case("dycoke", frames.dycoke_batched, frames.dycoke_loop, wide=True, share=5 / 8, video=True),
        Case("evs", frames.evs_batched, frames.evs_loop, wide=True, share=1 / 2, video=True),
        Case("expediting_vit", *_both(encoder.expediting_vit), EncoderStage(5), {"reconstruct": False}, wide=True,
             tolerance=1e-5, one_crop=True),
        Case("fastervlm", ranking.vtc_cls_batched, ranking.vtc_cls_loop),
        Case("fastv", ranking.last_row_batched, ranking.last_row_loop, 2),
        Case("fastvid", *_both(segments.fastvid), options=CUT, wide=True, tolerance=1e-5, video=True),
        Case("fitprune", inside.fitprune_batched, inside.fitprune_loop, 1),
        Case("flashvid", *_both(segments.flashvid), options=TREES, wide=True, tolerance=1e-5, video=True,
             steps="kept"),
        Case("fopru", ranking.vtc_cls_batched, ranking.vtc_cls_loop),
        Case("framefusion", frames.framefusion_batched, frames.framefusion_loop, wide=True, share=3 / 4,
             tolerance=1e-5, video=True),
        Case("globalcom2", tiles.globalcom2_batched, tiles.globalcom2_loop, options={"exact_total": False}),
        Case("gprune", redundancy.gprune_batched, redundancy.gprune_loop, options={"threshold": 0.1}, wide=True),
        Case("h2o", cache.h2o_batched, cache.h2o_loop, CACHE),
        Case("hiprune", tiles.hiprune_batched, tiles.hiprune_loop),
        Case("holitom", *_both(segments.holitom), options={"later": 1.0}, wide=True, tolerance=1e-5, video=True),
        Case("holov", pruned.holov_batched, pruned.holov_loop, wide=True),
        Case("longvlm", *_both(merging.longvlm), options={"clips": 2}, wide=True, tolerance=1e-5, video=True),
        Case("lookm", cache.lookm_batched, cache.lookm_loop, CACHE, wide=True, tolerance=1e-5),
        Case("mustdrop (filter)", ranking.mustdrop_batched, ranking.mustdrop_loop, 3, THRESHOLD),
        Case("mustdrop (windows)", *_both(merging.mustdrop_windows), options=WINDOWS, wide=True, tolerance=1e-5,
             one_crop=True),
        Case("pitome", *_both(merging.pitome), wide=True, tolerance=1e-5),
        Case("pixelprune", *_both(encoder.pixelprune), EncoderStage(0), {"tau": None}, one_crop=True),
        Case("pool", *_both(merging.pool), wide=True, tolerance=1e-5),
        Case("prumerge", *_both(pruned.prumerge), wide=True, tolerance=1e-5),
        Case("prumerge_plus", *_both(pruned.prumerge), wide=True, tolerance=1e-5),
        Case("pyramiddrop", ranking.last_row_batched, ranking.last_row_loop, 2),
        Case("pyramidkv", cache.snapkv_batched, cache.snapkv_loop, CACHE),
        Case("random", ranking.random_batched, ranking.random_loop, tolerance=None),
        Case("ranked_routing", ranking.last_row_batched, ranking.last_row_loop, 1, share=1 / 2),
        Case("scope", pruned.scope_batched, pruned.scope_loop, steps="kept"),
        Case("snapkv", cache.snapkv_batched, cache.snapkv_loop, CACHE),
        Case("sparsevlm", inside.sparsevlm_batched, inside.sparsevlm_loop, 3, wide=True, share=1 / 3,
             tolerance=1e-5, earlier=0),
        Case("streaming_kv", cache.streaming_batched, cache.streaming_loop, CacheStage()),
        Case("stride", ranking.stride_batched, ranking.stride_loop, tolerance=None),
        Case("todre (diversity)", diverse.todre_batched, diverse.todre_loop, options=DIVERSE, wide=True,
             steps="kept"),
        Case("todre (relevance)", ranking.parted_batched, ranking.parted_loop, 29, {"diversity": False}),
        Case("token_correlation", redundancy.correlation_batched, redundancy.correlation_loop, options=REPEATED),
        Case("token_transforming", *_both(encoder.token_transforming), EncoderStage(5), wide=True, tolerance=1e-5,
             one_crop=True),
        Case("tome", *_both(merging.tome), wide=True, tolerance=1e-5),
        Case("trim", *_both(merging.trim), options={"pair": "tiny-clip"}, wide=True, tolerance=1e-5),
        Case("transprune", inside.transprune_batched, inside.transprune_loop, 7, share=1 / 2),
        Case("v2drop", inside.v2drop_batched, inside.v2drop_loop, 3, wide=True, share=1 / 3, earlier=2),
        Case("vidcom2", frames.vidcom2_batched, frames.vidcom2_loop, wide=True, video=True),
        Case("visionzip", *_both(merging.visionzip), wide=True, tolerance=1e-5),
        Case("vispruner", pruned.vispruner_batched, pruned.vispruner_loop, steps="gone"),
        Case("vlcache", cache.vlcache_batched, cache.vlcache_loop, CACHE),
        Case("vqtoken", clusters.vqtoken_batched, clusters.vqtoken_loop, options=RESAMPLED, wide=True, keep=64,
             tolerance=None, largest=2880, steps="kept"),
        Case("vqtoken_codebook", clusters.vqtoken_batched, clusters.vqtoken_loop, options=ROUNDS, wide=True,
             keep=64, tolerance=None, largest=2880, steps="kept"),
        Case("vscan", *_both(merging.vscan), options={"later": 1.0}, wide=True, tolerance=1e-5, largest=2880),
        vtc_cls,
        Case("zero_tprune", *_both(encoder.zero_tprune), EncoderStage(2), one_crop=True),
    )  # fmt: skip
    return {case.name: case for case in cases}


WINDOWS = {"merge": "count", "retain": 320, "filter": "off", "cache": False}
REPEATED = {"threshold": 0.8}
THRESHOLD = {"filter": "threshold", "merge": "off"}
CACHE = CacheStage(8)
CUT = {"segments": 2, "threshold": 0.5}
TREES = {"segments": 2, "threshold": 0.5, "later": 1.0}
DIVERSE = {"relevance": False}
ROUNDS = {"iterations": 50}
RESAMPLED = {**ROUNDS, "resample": True, "weights": "vqtoken-tiny-llava"}


def _both(form: Callable[..., Tensor]) -> tuple[Form, Form]:
    return merging.at_once(form), merging.by_item(form)
