"""`vtc.explore`: choose picture, question, method and budget in Jupyter and see what is kept; needs ipywidgets."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from vtc.app.catalogue import list_methods
from vtc.app.images import open_image
from vtc.app.media import Video
from vtc.app.show import Shown, show
from vtc.errors import InputError, VTCError, one_line
from vtc.method.registry import create

EVERYTHING = "all stages"


class Explorer:
    """The widgets, in `box`, and what they show now, in `shown`; displays itself in Jupyter.

    Every change runs the model again; what cannot be run is said in place of the picture.
    """

    def __init__(
        self, model: Any, processor: Any, media: Mapping[str, Any], prompt: str, methods: Sequence[str], side: int
    ) -> None:
        import ipywidgets as widgets  # comes with the extra `notebooks`; nothing else needs it

        self.model, self.processor, self.media, self.side = model, processor, media, side
        self.shown: Shown | None = None
        late = {"continuous_update": False}
        self.picture = widgets.Dropdown(options=list(media), description="picture")
        self.prompt = widgets.Text(value=prompt, description="question", layout={"width": "100%"}, **late)
        self.method = widgets.Dropdown(options=list(methods), description="method")
        self.retention = widgets.FloatSlider(0.5, min=0.05, max=1.0, step=0.05, description="retention", **late)
        self.stage = widgets.Dropdown(options=[EVERYTHING], description="stage")
        self.scores = widgets.Checkbox(False, description="what stages ranked by")
        self.about, self.drawing = widgets.HTML(), widgets.Image(format="png")
        controls = [self.picture, self.prompt, self.method, self.retention]
        for control in controls:
            control.observe(self._run, "value")
        for control in (self.stage, self.scores):
            control.observe(self._draw, "value")
        self.box = widgets.VBox([*controls, widgets.HBox([self.stage, self.scores]), self.about, self.drawing])
        self._run()

    def _run(self, change: Any = None) -> None:
        """Ask the model under what is chosen now."""
        start = time.perf_counter()
        try:
            self.shown = show(
                self.model, self.processor, self.media[self.picture.value], self.prompt.value, self.method.value,
                self.retention.value, side=self.side,
            )  # fmt: skip
        except VTCError as error:
            self.shown = None
            self._say(one_line(error))
            self.drawing.value = b""
            return
        look, (seen,) = self.shown.look, self.shown.look.seen
        self._say(
            f"{seen.answer} (untouched: {look.answer}); {seen.kept:.4g} of {look.tokens} visual tokens per layer; "
            f"{time.perf_counter() - start:.2f} s for both answers"
        )
        self.stage.options = [EVERYTHING, *(name for name, _ in seen.stages)]  # sets its value to the first
        self._draw()

    def _draw(self, change: Any = None) -> None:
        """Draw the stages chosen of what was run last."""
        if self.shown is None:
            return
        look, (seen,) = self.shown.look, self.shown.look.seen
        stages = tuple(stage for stage in seen.stages if self.stage.value in (EVERYTHING, stage[0]))
        chosen = dataclasses.replace(look, seen=(dataclasses.replace(seen, stages=stages),))
        self.drawing.value = Shown(chosen, side=self.side, scores=self.scores.value)._repr_png_()

    def _say(self, text: str) -> None:
        self.about.value = f"<p>{escape(text)}</p>"

    def _repr_mimebundle_(self, **options: Any) -> Any:
        """The widgets, and for pages without a kernel the picture."""
        bundle = self.box._repr_mimebundle_(**options) or {}
        return {**bundle, "image/png": self.drawing.value} if self.drawing.value else bundle


def explore(
    model: Any,
    processor: Any,
    media: Any,
    prompt: str = "What is shown?",
    *,
    methods: Sequence[str] | None = None,
    side: int = 240,
) -> Explorer:
    """Widgets to choose picture, question, method, retention and stage, over what `vtc.show` draws.

    media: one picture or video as `vtc.show` takes them, or several by name. methods: those to choose from, by default
    all that need no learned weights and take a retention. side: pixels of a panel's longer side.

    >>> from vtc.testing import tiny_model
    >>> explore(tiny_model("llava-clip"), None, {})
    Traceback (most recent call last):
    ...
    vtc.errors.InputError: explore needs at least one picture and one method; pass media={'name': picture}

    Raises:
        InputError: no picture, or no method.
        ModuleNotFoundError: ipywidgets is not installed (extra `notebooks`).
    """
    given = dict(media) if isinstance(media, Mapping) else {"picture": media}
    opened = {
        name: each if isinstance(each, Video | list | tuple) else open_image(each) for name, each in given.items()
    }
    names = [name for name in list_methods(trained=False) if create(name).needs_budget] if methods is None else methods
    if not opened or not names:
        raise InputError("explore needs at least one picture and one method; pass media={'name': picture}")
    return Explorer(model, processor, opened, prompt, names, side)
