"""What a sweep is asked to do: `SweepSpec`, from keyword arguments or a YAML file.

Everything that can be refused without loading a model is refused here, in one line that says what to write instead.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from vtc.app.options import output_path
from vtc.app.video_reading import VideoReading
from vtc.errors import BudgetError, InputError
from vtc.eval import CONFIGS
from vtc.eval.method_spec import MethodSpec, Real, Whole, method_entries, sequence
from vtc.method.base import Positions
from vtc.method.budget import Budget

TRAINING_FREE = (
    "random", "stride", "pool", "vtc_cls", "globalcom2", "hiprune", "todre", "atp_training_free", "mustdrop", "aim",
    "vqtoken_codebook",
)  # fmt: skip


Quantity = Literal["tokens", "flops", "kv", "time"]
SHARED_DEVICES = ("auto", "cuda", "balanced")
"""Devices that stand for whatever GPUs a process is shown."""
RETENTIONS = (1.0, 0.5, 0.33, 0.22, 0.11, 0.05)


def _default_methods(model: str) -> tuple[MethodSpec, ...]:
    """The baselines that look at nothing and the methods of the library; learned ones where embedded weights fit."""
    learned = ("atp", "vqtoken") if model == "tiny-llava" else ()
    with_weights = [MethodSpec(name=name, weights=f"{name}-tiny-llava") for name in learned]  # type: ignore[call-arg]
    return (*(MethodSpec(name=name) for name in TRAINING_FREE), *with_weights)


class SweepSpec(BaseModel):
    """One sweep: a model, methods x retentions, and the tasks to answer.

    The untouched model is always part of a sweep and need not be listed. `methods` are names with hyper-parameters as
    text (`vtc.method.text`), mappings or Compressor objects; an entry that is itself a list acts together on one model.
    `plugins` are modules or files that register methods (`vtc.method.plugins`). `retentions` are fractions of the
    visual tokens, in (0, 1], `keep` numbers of tokens of each item; where only `keep` is given, only these are swept.
    `limit` is the number of questions per task, from its beginning; None means all of them.
    `positions` is the position policy of `vtc.compress`; None is its default. `generation` overrides the task's own
    generation settings. `prompt_profile` selects the entry of a task's `lmms_eval_specific_kwargs`, such as
    ``qwen2_5_vl``, where a task words its prompts differently for each model family. `budget` is what a retention is a
    share of: visual tokens, or the untouched model's prefill operations, bytes of KV cache or prefill time. `data_map`
    is a YAML file, or its content, that names local files in place of tasks' data sets (`vtc.eval.data_map`). `video`
    says how videos become frames, with the fields of `VideoReading`. `trackers` are names such as ``wandb`` and
    ``tensorboard``, which the metrics are sent to in the end. `max_memory` and `offload_folder` are for the device
    ``balanced``, see `vtc.app.loading.load`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = "tiny-llava"
    methods: tuple[MethodSpec, ...] = Field(default_factory=lambda known: _default_methods(known["model"]))
    keep: tuple[Whole, ...] = ()
    retentions: tuple[Real, ...] = Field(default_factory=lambda known: () if known.get("keep") else RETENTIONS)
    budget: Quantity = "tokens"
    tasks: tuple[str, ...] = ("tiny_image",)
    limit: Whole | None = Field(default=None, ge=1)
    batch_size: Whole = Field(default=24, ge=1)
    out: Path | None = None
    include_path: tuple[Path, ...] = ()
    data_map: Path | dict[str, Any] | None = None
    plugins: tuple[str, ...] = ()
    trackers: tuple[str, ...] = ()
    seed: Whole = 0
    positions: Positions | None = None
    generation: dict[str, Any] = Field(default_factory=dict)
    prompt_profile: str = "default"
    video: VideoReading = Field(default_factory=VideoReading)
    device: str = "auto"
    max_memory: dict[int | str, int | str] | None = None
    offload_folder: Path | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None
    revision: str | None = None
    engine: Literal["local", "ray"] = "local"
    workers: Whole = Field(default=1, ge=1)
    gpus_per_worker: Real | None = Field(default=None, ge=0, allow_inf_nan=False)
    address: str | None = None

    @field_validator("methods", mode="before")
    @classmethod
    def _name_is_enough(cls, given: Any) -> Any:
        return method_entries(given)

    @field_validator("retentions", "keep", "tasks", "include_path", "plugins", "trackers", mode="before")
    @classmethod
    def _one_is_a_list(cls, given: Any) -> Any:
        return sequence([given] if isinstance(given, str | int | float | Path) else given)

    @field_validator("methods", "retentions", "tasks")
    @classmethod
    def _not_empty(cls, given: tuple[Any, ...], info: ValidationInfo) -> tuple[Any, ...]:
        if not given:
            raise InputError(f"{info.field_name} is empty; name at least one, or leave the setting out for the default")
        return given

    @field_validator("retentions")
    @classmethod
    def _fractions(cls, given: tuple[float, ...]) -> tuple[float, ...]:
        for retention in given:
            Budget(retention=retention)
        return given

    @field_validator("keep")
    @classmethod
    def _counts(cls, given: tuple[int, ...]) -> tuple[int, ...]:
        for keep in given:
            Budget(keep=keep)
        return given

    @field_validator("model")
    @classmethod
    def _a_name(cls, given: str) -> str:
        if not given.strip():
            raise InputError("model is empty; write an embedded model, a folder or a hub name")
        return given

    @field_validator("video", mode="before")
    @classmethod
    def _of_numbers(cls, given: Any) -> Any:
        for name, value in given.items() if isinstance(given, Mapping) else ():
            if isinstance(value, bool):
                raise InputError(f"video.{name}: {str(value).lower()} is no number; leave it out for the default")
        return given

    @field_validator("gpus_per_worker")
    @classmethod
    def _of_gpus(cls, given: float | None, info: ValidationInfo) -> float | None:
        if given and given > 1 and given != int(given):
            raise InputError(f"gpus_per_worker {given:g} is no whole number of GPUs, and no share of one such as 0.5")
        device = info.data.get("device", "auto")
        if given and device not in SHARED_DEVICES:
            raise InputError(
                f"gpus_per_worker {given:g} shares out GPUs, and device {device!r} is one of its own choice; write"
                f" device: {', '.join(SHARED_DEVICES)}, or no gpus_per_worker"
            )
        return given

    @field_validator("address")
    @classmethod
    def _of_ray(cls, given: str | None, info: ValidationInfo) -> str | None:
        if given is not None and info.data.get("engine") != "ray":
            raise InputError(f"address {given!r} is that of a Ray cluster; write engine: ray beside it")
        return given

    @field_validator("out", mode="before")
    @classmethod
    def _a_path(cls, given: Any) -> Any:
        return output_path(given) if isinstance(given, str | Path) else given

    @property
    def folder(self) -> Path:
        """Where the sweep is stored: `out`, or ``results/`` and the last part of the model's name."""
        return self.out if self.out is not None else Path("results") / Path(self.model).name


def make_spec(settings: Mapping[str, Any], *, source: str = "sweep") -> SweepSpec:
    """Validate `settings`; `source` names their origin in error messages.

    Raises:
        InputError: an unknown key (the nearest known one is named), a value of the wrong type, an empty list.
        BudgetError: a retention outside (0, 1].

    >>> make_spec({"retention": [0.5]}, source="sweep.yaml")
    Traceback (most recent call last):
        ...
    vtc.errors.InputError: sweep.yaml: unknown key 'retention'; did you mean 'retentions'?
    """
    try:
        return SweepSpec.model_validate(dict(settings))
    except ValidationError as error:
        problem = error.errors()[0]
    cause = problem.get("ctx", {}).get("error")
    where = ".".join(str(part) for part in problem["loc"])
    if isinstance(cause, InputError | BudgetError):
        named = f"{where}: " if isinstance(problem["input"], bool) else ""  # the other messages say of what they are
        raise type(cause)(f"{source}: {named}{cause}")
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        raise InputError(f"{source}: unknown key {where!r}{_nearest_key(where)}")
    raise InputError(f"{source}: {where}: {problem['msg'].lower()}, got {problem['input']!r}")


def _nearest_key(key: str) -> str:
    known = [*SweepSpec.model_fields, *(f"video.{field.name}" for field in fields(VideoReading))]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f". Known keys: {', '.join(known)}"


def read_settings(path: Path) -> dict[str, Any]:
    """Settings in a YAML file, with `out` defaulting to ``results/`` and the file's name.

    A bare name that is not a file here may be one of the shipped configurations, such as ``quick``.

    Raises:
        InputError: the file is missing, is not YAML, or does not hold a mapping.
    """
    shipped = {file.stem: file for file in sorted(CONFIGS.glob("*.yaml"))}
    if not path.is_file():
        if str(path) not in shipped:
            raise InputError(f"no sweep file {str(path)!r}; write its path, or a shipped one: {', '.join(shipped)}")
        path = shipped[str(path)]
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if settings is None:
        settings = {}
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise InputError(f"{path}: expected 'key: value' lines, such as 'retentions: [0.5, 0.25]'")
    settings.setdefault("out", str(Path("results") / path.stem))
    return settings
