"""`vtc.compress`: check everything, attach a method to a model, hand back a handle."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vtc.batch.prompt import Bounds, Lengths, Questions, Sizes, pixel_sizes, texts
from vtc.engine.arguments import check_keywords, check_methods, check_model, check_options
from vtc.engine.handle import Handle
from vtc.errors import BudgetError, VTCError, shown
from vtc.method.base import Compressor, ModelSpec, Positions
from vtc.method.budget import Budget, ItemBudgets
from vtc.method.composite import Composite, combine
from vtc.method.registry import create

if TYPE_CHECKING:
    from vtc.adapters.encoder_base import EncoderAdapter
    from vtc.engine.encoder_engine import EncoderEngine
    from vtc.engine.engine import Engine
    from vtc.engine.sharing import SharedEncoder


def compress(
    model: nn.Module,
    method: str | Compressor | Sequence[str | Compressor],
    *,
    retention: float | Sequence[float | None] | Tensor | None = None,
    keep: int | Sequence[int | None] | Tensor | None = None,
    positions: Positions | None = None,
    pad_output: bool = False,
    trace: bool = True,
    prompt_length: Lengths | None = None,
    system_length: Lengths | None = None,
    processor: Any = None,
    image_sizes: Sizes | None = None,
    questions: Questions | None = None,
    **hyper_parameters: Any,
) -> Handle:
    """Attach a compression method to an unmodified Hugging Face model, or to a vision encoder alone.

    method: a registered name with its `hyper_parameters`, a Compressor, or a list of those that act at different
    stages, each with its entry in the lists `retention` and `keep`: the first to act gets a share of the input's
    tokens, a later one a share of those that reach it. retention: fraction of each item's visual
    tokens that reaches the LLM, mean over the layers for methods that prune inside it; keep: the same as a count per
    item. A single method also takes one value for each image and video of a call, a list or tensor in the order of the
    model's inputs, images first. positions: "preserve" keeps the original position ids of kept tokens, "compact"
    renumbers them without gaps at every stage, "compact_input" before the LLM alone; the method's default follows its
    paper. pad_output: put the outputs back at their input positions, which training
    with labels needs. trace: record kept positions. prompt_length: how many tokens of each row (padding not counted)
    are the prompt, where the input goes on with an answer and neither labels nor generate() tell; one number, or one
    for each prompt of the batch. system_length: how many of them are the system prompt, which no method takes for the
    question; by default it ends with the last control token in front of a row's first visual token. processor: the
    checkpoint's, where the model's inputs do not show what is one item: InternVL needs it to tell the frames of a video
    from images. image_sizes: (height, width) in pixels of every picture that the processor was given, in the order of
    the prompts, from which InternVL's adapter knows, with the processor, how their tiles lie; other families see it.
    questions: the text of each prompt of a batch, for methods with a CLIP pair; without it they take what the
    processor's tokenizer makes of the prompt's own text.

    Encoders without an LLM (`vtc.adapters.ENCODERS`: CLIP, SigLIP, DINOv2, ViT, open_clip's CLIP and timm's
    VisionTransformer) take methods that act inside the encoder alone, and none of the arguments from `positions` on but
    `trace`. retention is then the share of each image's patches that leaves the last layer.

    Raises VTCError (BudgetError, UnknownName, UnsupportedModel, UnsupportedMethod) before the model is touched.

    >>> from vtc.testing import tiny_inputs, tiny_model
    >>> model = tiny_model("llava-clip")
    >>> with compress(model, "vtc_cls", retention=0.25) as handle:
    ...     output = model.generate(**tiny_inputs("llava-clip", [[3, "image", 5]], model=model), max_new_tokens=2)
    >>> handle.stats.retention
    0.25
    """
    # These bring in transformers, which `import vtc` does not need.
    from vtc import adapters
    from vtc.engine.engine import Engine

    check_model(model, method)
    check_options(positions, pad_output, trace)
    check_keywords(compress, method, hyper_parameters)
    if isinstance(method, list | tuple):
        parts = [create(part) if isinstance(part, str) else part for part in method]
        if hyper_parameters or not parts or not all(isinstance(part, Compressor) for part in parts):
            raise VTCError(
                f"method={shown(method)} with hyper-parameters {sorted(hyper_parameters)} is no list of methods; write "
                "for example [vtc.create('hiprune', alpha=0.2), vtc.create('aim', merge=False)]"
            )
        method, budget = combine(parts, _plain(retention), _plain(keep)), None
    else:
        method = _single(method, hyper_parameters)
        budget = _budget(method, retention, keep)
    encoder = adapters.encoder_of(model)
    if encoder is not None:
        given = (positions, pad_output or None, prompt_length, system_length, processor, image_sizes, questions)
        alike = None if budget is None else budget.alike(method.name)
        return _attach(_encoder_engine(encoder, method, alike, given, trace=trace))
    adapter = adapters.of(model)
    if processor is not None:
        adapter.learn(processor)
    spec = adapter.spec
    plan = method.plan(spec)
    if isinstance(method, Composite):
        for part, own in zip(method.parts, method.budgets, strict=True):
            _check_reach(part, own, spec)
    else:
        _check_reach(method, budget, spec)
    engine = Engine(
        adapter, method, plan, budget, positions or plan.positions, pad_output=pad_output, trace=trace,
        bounds=Bounds(prompt_length, system_length, pixel_sizes(image_sizes), texts(questions)), processor=processor,
    )  # fmt: skip
    return _attach(engine)


def _attach(engine: Engine | EncoderEngine) -> Handle:
    try:
        engine.attach()
    except BaseException:
        engine.detach()
        raise
    return Handle(engine)


def _encoder_engine(
    encoder: EncoderAdapter, method: Compressor, budget: Budget | None, given: tuple[Any, ...], *, trace: bool
) -> EncoderEngine:
    """given: the arguments that are about an LLM, None where they were left out."""
    # As in `compress`.
    from vtc.engine.encoder_engine import EncoderEngine

    names = ("positions", "pad_output", "prompt_length", "system_length", "processor", "image_sizes", "questions")
    about = [name for name, value in zip(names, given, strict=True) if value is not None]
    if about:
        raise VTCError(
            f"{', '.join(about)} given for a {type(encoder.model).__name__}, which has no LLM behind its encoder; "
            "leave it out"
        )
    return EncoderEngine(encoder, method, budget, trace=trace)


def _check_reach(method: Compressor, budget: Budget | ItemBudgets | None, model: ModelSpec) -> None:
    if budget is not None:
        budget.check_reach(method.least_retention(model), model.llm_layers, method.name)


def _single(method: Any, hyper_parameters: dict[str, Any]) -> Compressor:
    if isinstance(method, str):
        return create(method, **hyper_parameters)
    if not isinstance(method, Compressor):
        call = f"{method.__name__}()" if isinstance(method, type) else "vtc.create('vtc_cls')"
        raise VTCError(
            f"method={shown(method)} is neither a registered name nor a Compressor object; write for example 'vtc_cls' "
            f"or {call}"
        )
    if hyper_parameters:
        given = ", ".join(sorted(hyper_parameters))
        raise VTCError(f"{given} given beside a finished {method.name!r} object; set it when building the object")
    return method


def _budget(method: Compressor, retention: Any, keep: Any) -> Budget | ItemBudgets | None:
    if not method.needs_budget and (retention is not None or keep is not None):
        raise BudgetError(f"{method.name!r} takes no retention or keep; its hyper-parameters decide how much it keeps")
    if not method.needs_budget:
        return None
    retention, keep = _plain(retention), _plain(keep)
    several = isinstance(retention, list | tuple) or isinstance(keep, list | tuple)
    return ItemBudgets.of(retention, keep) if several else Budget(retention, keep)


def _plain(numbers: Any) -> Any:
    return numbers.tolist() if isinstance(numbers, Tensor) else numbers


def share_encoder(model: nn.Module, methods: Iterable[Compressor] = ()) -> SharedEncoder:
    """Keep encoder outputs by pixel tensor, so that several methods and the untouched model share one encoding.

    Pixels or weights outside the language model that change (in place, by an optimizer, by loading or merging weights),
    another training or gradient mode and another autocast dtype are noticed, and the images encoded anew. Features that
    carry a gradient are not shared. A copy of the model made inside the block encodes for itself.
    methods: everything that will be attached inside the block; the union of the attention rows they need is recorded.
    Methods with encoder stages still encode for themselves.

    >>> import vtc
    >>> from vtc.testing import tiny_inputs, tiny_model
    >>> model, methods = tiny_model("llava-clip"), [vtc.create("vtc_cls"), vtc.create("random")]
    >>> inputs = tiny_inputs("llava-clip", [[3, "image", 5]], model=model)
    >>> with vtc.share_encoder(model, methods) as shared:
    ...     for method in methods:
    ...         with vtc.compress(model, method, retention=0.25):
    ...             output = model.generate(**inputs, max_new_tokens=2)  # the tower runs once
    ...     shared.clear()  # before the next images
    """
    # As above.
    from vtc import adapters
    from vtc.engine.sharing import SharedEncoder

    check_model(model)
    return SharedEncoder(adapters.of(model), check_methods(methods))
