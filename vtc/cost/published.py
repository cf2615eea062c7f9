"""Shapes of published models, as their configuration files state them, so that costs need no download.

Vocabularies are those of the configurations; checkpoints may pad their embeddings by a few rows.
"""

from __future__ import annotations

from dataclasses import replace

from vtc.cost.shapes import LLMShape, ModelShape, ProjectorShape, TowerShape
from vtc.errors import unknown_name

VICUNA_7B = LLMShape(4096, 11008, 32, 32, 32, 128, 32000)
VICUNA_13B = LLMShape(5120, 13824, 40, 40, 40, 128, 32000)
QWEN2_0_5B = LLMShape(896, 4864, 24, 14, 2, 64, 151936, "qwen2")
QWEN2_1_5B = LLMShape(1536, 8960, 28, 12, 2, 128, 151936, "qwen2")
QWEN2_5_3B = LLMShape(2048, 11008, 36, 16, 2, 128, 151936, "qwen2")
QWEN2_7B = LLMShape(3584, 18944, 28, 28, 4, 128, 152064, "qwen2")
QWEN3_4B = LLMShape(2560, 9728, 36, 32, 8, 128, 151936, "qwen3")
QWEN3_8B = LLMShape(4096, 12288, 36, 32, 8, 128, 151936, "qwen3")
INTERNLM2_5_1_8B = LLMShape(2048, 8192, 24, 16, 8, 128, 92553, "internlm2")
INTERNLM2_5_7B = LLMShape(4096, 14336, 32, 32, 8, 128, 92553, "internlm2")

CLIP_L = TowerShape(1024, 4096, 24, 1024, 3 * 14**2, prefix=1)
SIGLIP = TowerShape(1152, 4304, 26, 1152, 3 * 14**2)
INTERN_VIT = TowerShape(1024, 4096, 24, 1024, 3 * 14**2, prefix=1)
QWEN2_VIT = TowerShape(1280, 5120, 32, 1280, 2 * 3 * 14**2)
QWEN2_5_VIT = TowerShape(1280, 3420, 32, 1280, 2 * 3 * 14**2, matrices=3, full=(7, 15, 23, 31))


def _llava(name: str, llm: LLMShape, tower: TowerShape, patches: int, crops: int, source: str) -> ModelShape:
    projector = ProjectorShape(tower.hidden, llm.hidden, llm.hidden, cut=tower.prefix)
    return ModelShape(name, llm, tower, projector, patches, crops * patches, source)


def _qwen(name: str, llm: LLMShape, tower: TowerShape, source: str, *, deep: int = 0) -> ModelShape:
    wide = 4 * tower.hidden
    projector = ProjectorShape(wide, wide, llm.hidden, 4, copies=1 + deep)
    return ModelShape(name, llm, tower, projector, None, 1024, source, window=8 if tower.full else None)


def _internvl(name: str, llm: LLMShape, source: str) -> ModelShape:
    projector = ProjectorShape(4 * INTERN_VIT.hidden, llm.hidden, llm.hidden, 4, cut=1)
    return ModelShape(name, llm, INTERN_VIT, projector, 1024, 13 * 256, source)


def _qwen3_vit(hidden: int, intermediate: int, layers: int) -> TowerShape:
    return TowerShape(hidden, intermediate, layers, hidden, 2 * 3 * 16**2)


def _vocabulary(llm: LLMShape) -> LLMShape:
    """With the vocabulary of InternVL2.5 and 3, which have 15 tokens of their own behind Qwen2.5's 151 659."""
    return replace(llm, vocabulary=151674)


PUBLISHED = {
    each.name: each
    for each in (
        _llava("llava-1.5-7b", VICUNA_7B, CLIP_L, 576, 1, "liuhaotian/llava-v1.5-7b"),
        _llava("llava-1.5-13b", VICUNA_13B, CLIP_L, 576, 1, "liuhaotian/llava-v1.5-13b"),
        _llava("llava-next-7b", VICUNA_7B, CLIP_L, 576, 5, "liuhaotian/llava-v1.6-vicuna-7b"),
        _llava("llava-next-13b", VICUNA_13B, CLIP_L, 576, 5, "liuhaotian/llava-v1.6-vicuna-13b"),
        _llava("llava-onevision-0.5b", QWEN2_0_5B, SIGLIP, 729, 5, "lmms-lab/llava-onevision-qwen2-0.5b-ov"),
        _llava("llava-onevision-7b", QWEN2_7B, SIGLIP, 729, 5, "lmms-lab/llava-onevision-qwen2-7b-ov"),
        _qwen("qwen2-vl-2b", QWEN2_1_5B, QWEN2_VIT, "Qwen/Qwen2-VL-2B-Instruct"),
        _qwen("qwen2-vl-7b", QWEN2_7B, QWEN2_VIT, "Qwen/Qwen2-VL-7B-Instruct"),
        _qwen("qwen2.5-vl-3b", QWEN2_5_3B, QWEN2_5_VIT, "Qwen/Qwen2.5-VL-3B-Instruct"),
        _qwen("qwen2.5-vl-7b", QWEN2_7B, QWEN2_5_VIT, "Qwen/Qwen2.5-VL-7B-Instruct"),
        _qwen("qwen3-vl-4b", QWEN3_4B, _qwen3_vit(1024, 4096, 24), "Qwen/Qwen3-VL-4B-Instruct", deep=3),
        _qwen("qwen3-vl-8b", QWEN3_8B, _qwen3_vit(1152, 4304, 27), "Qwen/Qwen3-VL-8B-Instruct", deep=3),
        _internvl("internvl2.5-2b", INTERNLM2_5_1_8B, "OpenGVLab/InternVL2_5-2B"),
        _internvl("internvl2.5-8b", INTERNLM2_5_7B, "OpenGVLab/InternVL2_5-8B"),
        _internvl("internvl3-1b", _vocabulary(QWEN2_0_5B), "OpenGVLab/InternVL3-1B"),
        _internvl("internvl3-2b", _vocabulary(QWEN2_1_5B), "OpenGVLab/InternVL3-2B"),
        _internvl("internvl3-8b", _vocabulary(QWEN2_7B), "OpenGVLab/InternVL3-8B"),
    )
}
"""By name; `source` is the repository whose config.json states the numbers."""


def published(name: str) -> ModelShape:
    """The shape of that name; raises UnknownName with near matches."""
    if name not in PUBLISHED:
        raise unknown_name("model shape", name, list(PUBLISHED))
    return PUBLISHED[name]
