"""What a compression method is: a frozen set of hyper-parameters, a plan, and one function that selects tokens.

A method names the *stages* at which it acts and the readings it *needs*; the engine provides both on any supported
model and hands over a `StageView` in which all items of the batch lie side by side as dense tensors.
"""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from vtc.errors import VTCError
from vtc.method.budget import Budget
from vtc.method.groups import Groups, Scope
from vtc.method.hyper_parameters import check
from vtc.method.plan import (
    AFTER_PREFILL,
    PIXELS,
    PRE_LLM,
    CacheStage,
    EncoderStage,
    ModelSpec,
    Needs,
    Plan,
    Positions,
    Stage,
)
from vtc.method.rows import Rows
from vtc.method.view import Selection, StageView

__all__ = [
    "AFTER_PREFILL",
    "PIXELS",
    "PRE_LLM",
    "CacheStage",
    "Compressor",
    "EncoderStage",
    "ModelSpec",
    "Needs",
    "Order",
    "Plan",
    "Positions",
    "Rows",
    "Scope",
    "ScoringCompressor",
    "Selection",
    "Stage",
    "StageView",
]


@dataclass(frozen=True)
class Compressor(ABC):
    """Base of all methods. Subclasses are frozen dataclasses; their fields are the method's hyper-parameters.

    `vtc.register` makes the dataclass. Values are checked and converted by the fields' annotations
    (`vtc.method.hyper_parameters`); a subclass with a check of its own calls `super().__post_init__()` first.

    name: registered name, by default the class's in snake_case. version: raised whenever results change. trained: needs
    learned weights. stages: where it acts on every model; override `plan` where that depends on the model. small:
    hyper-parameters for pictures of a few tokens, such as those of the tiny models, where its own do not fit them.

    >>> import torch, vtc
    >>> class EveryOther(vtc.Compressor):
    ...     needs_budget = False
    ...     def select(self, view):
    ...         return vtc.Selection(view.items.token % 2 == 0)
    >>> from vtc.testing import tiny_inputs, tiny_model
    >>> model = tiny_model("llava-clip")
    >>> with torch.no_grad(), vtc.compress(model, EveryOther()) as handle:
    ...     output = model(**tiny_inputs("llava-clip", [[3, "image", 5]], model=model))
    >>> handle.stats.retention
    0.5
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    trained: ClassVar[bool] = False
    stages: ClassVar[tuple[Stage, ...]] = (PRE_LLM,)
    small: ClassVar[Mapping[str, Any]] = {}
    _named: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._named = cls._named or "name" in vars(cls)  # a name that is written is inherited
        if not cls._named:
            cls.name = snake_case(cls.__name__)

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def from_options(cls, **given: Any) -> Self:
        """The method with the hyper-parameters `given` by name, and its defaults for the others."""
        none = dataclasses.MISSING
        required = [f.name for f in dataclasses.fields(cls) if f.init and f.default is f.default_factory is none]
        if missing := [name for name in required if name not in given]:
            raise VTCError(
                f"{cls.name!r} has no default for {' and '.join(missing)}; write for example "
                f"vtc.create({cls.name!r}, {missing[0]}=...)"
            )
        return cls(**given)

    def described(self) -> dict[str, Any]:
        """What results depend on beside the version: the hyper-parameters, and the contents of files they name."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self) if field.compare}

    @property
    def needs_budget(self) -> bool:
        """True when it takes retention or keep; override it where hyper-parameters can decide instead."""
        return True

    @property
    def only_retention(self) -> float | None:
        """The one retention that it can meet; None where there are others."""
        return None

    def keeps_all(self, budget: Budget | None, tokens: int) -> bool:
        """True when an item of so many tokens passes whole; where all do, the model runs untouched, bit for bit."""
        return budget is not None and budget.tokens(tokens) >= tokens

    def reads(self, model: ModelSpec, layer: int, memory: dict[Any, Any]) -> bool:
        """False where what the plan reads of LLM layer `layer` turns out not to be needed in this call.

        Asked when the layer is reached; memory: what the method left at earlier stages of the call.
        """
        return True

    def module(self, model: ModelSpec) -> nn.Module | None:
        """The learned parts with their weights; None for training-free methods."""
        return None

    def plan(self, model: ModelSpec) -> Plan:
        """Stages, needs and position policy on this model; raises UnsupportedMethod where it cannot run.

        The default policy follows the released implementations: what is removed before the LLM leaves no gap in the
        positions, except under multi-axis rotary positions and after pruning inside the LLM.
        """
        inside = any(isinstance(stage, int) and stage > 0 for stage in self.stages)
        return Plan(self.stages, Needs(), "preserve" if inside or model.mrope else "compact")

    def least_retention(self, model: ModelSpec) -> float:
        """What a retention has to exceed on this model: the share of LLM layers in front of the first stage.

        Zero for methods that act before the LLM. Override it where other layers than the stages decide.
        """
        spending = [stage for stage in self.plan(model).stages if not isinstance(stage, CacheStage)]
        inside = [stage for stage in spending if isinstance(stage, int) and 0 < stage < model.llm_layers]
        return min(inside) / model.llm_layers if inside and len(inside) == len(spending) else 0.0

    @abstractmethod
    def select(self, view: StageView) -> Selection | None:
        """Choose the tokens that pass `view.stage`; None keeps everything."""


def snake_case(name: str) -> str:
    """The name of a method from that of its class.

    >>> snake_case("KeepCorners"), snake_case("ATPTrainingFree"), snake_case("Top2K")
    ('keep_corners', 'atp_training_free', 'top2_k')
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _plain(value: Any) -> Any:
    """A hyper-parameter without dataclasses in it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return type(value)(map(_plain, value)) if type(value) in (tuple, list) else value


Order = Literal["raster", "official"]
"""How what is left is laid out: in the order of the picture, or as the released code of a method lists it."""


@dataclass(frozen=True)
class ScoringCompressor(Compressor):
    """A method that keeps the highest-scoring tokens of each item before the LLM.

    scope: "item" ranks all tokens of an image or video together; "crop" ranks inside every crop, tile or frame and
    keeps the same share of each (sizes differ after unpadding; largest remainders make the total exact). The two agree
    on images of one crop. Subclasses set the default that suits their scores.

    >>> class KeepFirst(ScoringCompressor):
    ...     def score(self, view):
    ...         return -view.items.token.float()
    >>> KeepFirst().name, KeepFirst(scope="crop").scope
    ('keep_first', 'crop')
    """

    scope: Scope = field(default="item", kw_only=True)

    @abstractmethod
    def score(self, view: StageView) -> Tensor:
        """[I, N] scores, higher is kept; entries behind an item's end may hold anything."""

    def select(self, view: StageView) -> Selection:
        """Keep the `view.keep` best tokens of each item, in their original order."""
        scores = self.score(view)
        return Selection(Groups.of(view, self.scope).best(scores), counts=view.keep, scores=scores)
