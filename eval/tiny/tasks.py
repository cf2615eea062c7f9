"""The five generated tasks."""

from __future__ import annotations

from vtc.eval.tiny import clip_questions, detail, layout, lists, multi, questions, scenes
from vtc.eval.tiny.sample import Facts, Sample, Task, about_picture


def _image(seed: int, split: str) -> Sample:
    scene = scenes.make_scene(seed, split)
    return Sample(scene.image[None], Facts((scene.items,), (scenes.SIZE, scenes.SIZE)))


IMAGE = Task(
    name="tiny_image",
    media="image",
    geometries=1,
    make=_image,
    families={name: about_picture(ask) for name, ask in questions.FAMILIES.items()},
    answers=questions.ANSWERS,
    slots=layout.SLOTS,
    fallbacks=("referring", "location", "existence"),
)
TASKS = {task.name: task for task in (IMAGE, detail.TASK, clip_questions.TASK, lists.TASK, multi.TASK)}
