"""Methods whose visual tokens skip single layers of the LLM: which layers, and how many tokens go through each."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from vtc.errors import UnsupportedMethod, VTCError
from vtc.method.base import Compressor, ModelSpec, Selection, StageView
from vtc.method.schedule import Rates, Schedule, check
from vtc.ops.host import put
from vtc.ops.select import top_k


@dataclass(frozen=True)
class RoutedCompressor(Compressor):
    """A method that lets the best of the visual tokens through a layer of the LLM, and the others around it.

    schedule: the share of the tokens that goes through each layer, as a shape whose mean over the layers meets the
    budget or as a rate for every layer, see `vtc.method.schedule`; with rates no retention or keep is given. layers:
    instead, the LLM layers that tokens may skip, from 1 on, numbered in the model; all of them let the same share
    through. Subclasses plan stages and skips at `routed` and say by what the tokens are ranked there.

    >>> from dataclasses import dataclass
    >>> import torch, vtc
    >>> @dataclass(frozen=True)
    ... class First(RoutedCompressor):
    ...     def plan(self, model):
    ...         return vtc.Plan(self.routed(model), vtc.Needs(), "preserve", skips=self.routed(model))
    ...     def score(self, view):
    ...         return -view.items.token.float()
    >>> from vtc.testing import tiny_inputs, tiny_model
    >>> model = tiny_model("llava-clip")
    >>> with torch.no_grad(), vtc.compress(model, First(layers=(1, 3)), retention=0.75) as handle:
    ...     output = model(**tiny_inputs("llava-clip", [[3, "image", 5]], model=model))
    >>> handle.stats.calls[0].entering
    ((1, (16,)), (1, (8,)), (1, (16,)), (1, (8,)))
    """

    schedule: Rates | str = "cosine(0.15)"
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.schedule)
        if self.layers is None:
            return
        if not self.layers or list(self.layers) != sorted({max(1, layer) for layer in self.layers}):
            raise VTCError(f"layers={self.layers!r} must rise and begin at 1 or later; such as those of lowest rank")
        if self.schedule != type(self).schedule:
            raise VTCError("schedule says which layers tokens skip and how many do; leave out layers beside it")

    @property
    def needs_budget(self) -> bool:
        return isinstance(self.schedule, str)

    def routed(self, model: ModelSpec) -> tuple[int, ...]:
        """The layers of this model that tokens may skip."""
        if model.llm_layers < 2:
            raise UnsupportedMethod(f"the LLM of this {model.family} model has one layer, which sees every token")
        if self.layers is not None:
            return self.layers
        return tuple(range(min(self._schedule(model).starts), model.llm_layers))

    def least_retention(self, model: ModelSpec) -> float:
        return 1 - len(self.routed(model)) / model.llm_layers

    @abstractmethod
    def score(self, view: StageView) -> Tensor:
        """[I, N] what the tokens are ranked by in front of layer `view.stage`; the highest go through."""

    def select(self, view: StageView) -> Selection | None:
        assert isinstance(view.stage, int)
        counts = self.through(view, view.stage)
        if counts == view.items.counts:
            return None
        scores = self.score(view)
        kept = top_k(scores, put(counts, view.device), view.items.gaps, most=max(counts))
        return Selection(kept, counts=counts, scores=scores)

    def through(self, view: StageView, layer: int) -> tuple[int, ...]:
        """Tokens of each item that go through LLM layer `layer`."""
        items = view.items
        if self.layers is not None:
            return view.keep_from_layer(view.model.llm_layers - len(self.layers))
        schedule = self._schedule(view.model)
        granted = view.granted if self.needs_budget else items.entered
        columns = zip(items.counts, items.entered, granted, items.fixed, items.input_counts, strict=True)
        start = max(start for start in schedule.starts if start <= layer)
        return tuple(min(now, schedule.left(*item).get(start, now)) for now, *item in columns)

    def _schedule(self, model: ModelSpec) -> Schedule:
        return Schedule.read(self.schedule, model.llm_layers)
