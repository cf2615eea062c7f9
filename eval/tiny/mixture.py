"""Training of a model on a mixture of tasks."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.app.loading import load
from vtc.eval.tiny import checkpoint, loop, record
from vtc.eval.tiny.export import export
from vtc.eval.tiny.family import Family, Recorder, Seen, media_inputs, prefix_ids
from vtc.eval.tiny.heads import CellHeads
from vtc.eval.tiny.mix_validation import held_out, measure
from vtc.eval.tiny.mixed_batches import MixedBatch, packed_hidden, plan, streams, visual_places
from vtc.eval.tiny.model import TRAINING_ATTENTION
from vtc.eval.tiny.packing import IGNORED, Packed
from vtc.eval.tiny.places import NOTHING, PlaceHeads, place_targets
from vtc.eval.tiny.progress import Reporter
from vtc.eval.tiny.recipes import Recipe
from vtc.eval.tiny.sample import Facts, Task, pack
from vtc.eval.tiny.settings import Stage
from vtc.eval.tiny.stream import Stream
from vtc.eval.tiny.targets import cell_targets, legible_items, presence
from vtc.eval.tiny.vocabulary import END, TOKEN


@dataclass
class MixTrainer:
    """Model, auxiliary heads and data of a run on one device."""

    settings: Recipe
    out: Path
    device: torch.device
    family: Family
    processor: Any
    model: Any
    heads: CellHeads
    places: PlaceHeads
    series: list[Stream]
    batches: list[tuple[int, int]]
    checked: list[Stream]
    prefixes: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    @classmethod
    def create(cls, recipe: Recipe, out: Path, device: torch.device) -> MixTrainer:
        """Fresh weights from the seed of the recipe, but for those that its start gives."""
        torch.manual_seed(recipe.seed)
        family = recipe.family()
        model = family.build(TRAINING_ATTENTION)
        if recipe.start:
            take_over(model, recipe.start)
        model = model.to(device).train()
        family.speed_up(model)
        heads = CellHeads(family.width, family.grid, family.hidden if family.has_classes else 0).to(device)
        places = PlaceHeads(family.hidden).to(device)
        batches = plan(recipe, sum(stage.steps for stage in recipe.stages))
        samples = out / "samples"
        series, checked = streams(recipe, samples), held_out(recipe, samples)
        return cls(recipe, out, device, family, family.processor(), model, heads, places, series, batches, checked)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint holds."""
        return {"model": self.model, "heads": self.heads, "places": self.places}

    def compile(self) -> None:
        """Compile the layers of tower and language model, for any length of the sequence."""
        torch._dynamo.config.recompile_limit = 64  # graphs of one layer: kinds of layers, with and without gradients
        for layer in (*self.family.layers(self.model), *self.model.model.language_model.layers):
            layer.forward = torch.compile(layer.forward, dynamic=True)  # what reads the output of a layer stays outside

    def exported(self) -> Any:
        """A copy of the model without anything of the training."""
        model = self.family.build("sdpa")
        model.load_state_dict(self.model.state_dict())
        return model

    def trained(self, stage: Stage) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters that a stage updates."""
        sources = {"": self.model if stage.language else self.family.tower(self.model), "heads.": self.heads}
        if stage.language:
            sources["places."] = self.places
        return [(prefix + n, p) for prefix, source in sources.items() for n, p in source.named_parameters()]

    def batch(self, index: int, step: int) -> MixedBatch:
        """Batch of a step of a stage."""
        at = step + sum(stage.steps for stage in self.settings.stages[:index])
        chosen, start = self.batches[at]
        stream = self.series[chosen]
        numbers = [stream.number(start + n, self.settings.seed) for n in range(self.settings.batch_size)]
        return self.make(stream, numbers, random.Random(f"{self.settings.seed} {at}"))

    def make(self, stream: Stream, numbers: Sequence[int], rng: random.Random) -> MixedBatch:
        """These samples of a series with one random packed text each."""
        task = stream.task
        pictures, facts = stream.read(numbers)
        packed = [pack(task, known, rng) for known in facts]
        key = (task.name, stream.geometry)
        if key not in self.prefixes:
            self.prefixes[key] = prefix_ids(self.processor, task.media, pictures[0]).to(self.device)
        inputs = media_inputs(self.processor, task.media, pictures)
        targets, present = self._targets(task, facts)
        places = self._places(facts, self.prefixes[key]).to(self.device) if task.media == "video" else None
        return MixedBatch(
            task,
            {name: value.to(self.device) for name, value in inputs.items()},
            targets.to(self.device),
            present.to(self.device),
            places,
            _clues(packed).to(self.device),
            self.prefixes[key],
            torch.tensor([text.ids for text in packed], device=self.device),
            torch.tensor([text.labels for text in packed], device=self.device),
            [text.families for text in packed],
        )

    def _targets(self, task: Task, facts: Sequence[Facts]) -> tuple[Tensor, Tensor]:
        cells, present = [], []
        for known in facts:
            for view in self.family.views(task.media, len(known.pictures), known.size):
                items = [item for number in view.pictures for item in known.pictures[number]]
                cells.append(cell_targets(items, view.box, view.rows, view.columns))
                present.append(presence(legible_items(items, view.box, view.rows, view.columns)))
        return torch.from_numpy(np.stack(cells)), torch.from_numpy(np.stack(present))

    def _places(self, facts: Sequence[Facts], prefix: Tensor) -> Tensor:
        """Of the visual tokens of clips, (B, n, 2): views have as many rows as columns, and marks show nothing."""
        visual = int(visual_places(prefix).sum())
        made = np.full((len(facts), visual, 2), NOTHING, dtype=np.uint8)
        for row, known in zip(made, facts, strict=True):
            views = self.family.views("video", len(known.pictures), known.size)
            side = math.isqrt(visual // len(views))
            found = np.concatenate([place_targets(known, view, side, side) for view in views])
            row[: len(found)] = found
        return torch.from_numpy(made)

    def answered(self, batch: MixedBatch, seen: Seen) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Last hidden states of the packed text, (B, T, hidden), and what `places` reads.

        That is visual tokens behind a quarter of the layers, and the text behind two thirds of them.
        """
        layers = self.model.model.language_model.layers
        depth = len(layers)
        early, late = (Recorder(layers[max(1, n) - 1], output=True) for n in (depth // 4, 2 * depth // 3))
        with early, late:
            hidden = packed_hidden(self.family, self.model, batch, seen.tokens)
        visual = visual_places(batch.prefix)[0].nonzero()[:, 0]
        return hidden, (early.value[:, visual], late.value[:, batch.prefix.shape[1] :])

    def measure(self, stage: Stage) -> dict[str, float]:
        """Accuracies on held-out samples."""
        return measure(self, self.checked, stage)

    def losses(self, batch: MixedBatch, stage: Stage) -> dict[str, Tensor]:
        """Unweighted losses of one batch."""
        with loop.mixed(self.device):
            seen = self.family.see(self.model, batch.task.media, batch.inputs)
            losses: dict[str, Tensor] = self.heads(seen, batch.targets, batch.present)
            if stage.language:
                hidden, read = self.answered(batch, seen)
                answer = self._answer_loss(hidden, batch.labels)
                losses |= {"answer": answer, batch.task.name: answer.detach()}
                if batch.places is not None:
                    losses |= self.places(read, batch.places, batch.clues)
        return losses

    def _answer_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of the answers, plus a little of the end tokens behind those of one word."""
        asked = labels != IGNORED
        loss = F.cross_entropy(self.model.lm_head(hidden[asked]).float(), labels[asked], reduction="none")
        one_word = (labels == TOKEN[END]) & (labels.roll(2, dims=1) == IGNORED)
        weight = torch.where(one_word[asked], self.settings.end_weight, 1.0)
        return (loss * weight).sum() / weight.sum()

    def total(self, losses: dict[str, Tensor], stage: Stage) -> Tensor:
        """Weighted sum to minimise."""
        auxiliary = losses["content"] + sum(losses.get(name, 0.0) for name in ("place", "presence", "spot", "clues"))
        if not stage.language:
            return auxiliary
        return self.settings.language_weight * losses["answer"] + self.settings.auxiliary_weight * auxiliary


def _clues(packed: Sequence[Packed]) -> Tensor:
    """What answers of packed texts follow from, (B, T, 4), `NOTHING` at tokens from which none is predicted."""
    made = torch.full((len(packed), len(packed[0].ids), 4), NOTHING)
    for row, text in zip(made, packed, strict=True):
        for place, clues in text.clues.items():
            row[place] = torch.tensor(clues)
    return made


def take_over(model: nn.Module, start: str) -> list[str]:
    """Load every tensor that the embedded model `start`, or a folder, has under the same name and in the same shape.

    Returns their names: of another class the language model, of the same class everything. Raises InputError where
    nothing can be loaded.
    """
    return checkpoint.fill(model, load(start, device="cpu", dtype="float32").model.state_dict())


def train_mixture(
    out: Path,
    recipe: Recipe,
    device: str = "auto",
    threads: int = 0,
    save_every: int = 50,
    on_step: loop.StepHook = lambda stage, step: None,
    compiled: bool = False,
) -> Path:
    """Train the model of a recipe into `out`, or go on with the run that `out` holds; returns the exported folder.

    `threads`, `save_every` and `on_step` are those of `train.train`. `compiled` makes steps faster and the start
    minutes slower.
    """
    chosen = loop.pick_device(device)
    if threads > 0:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    with Reporter(out / "log.jsonl") as reporter:
        trainer = MixTrainer.create(recipe, out, chosen)
        if compiled:
            trainer.compile()
        seconds = loop.run(trainer, reporter, save_every, on_step)
    folder = out / "model"
    export(trainer.exported(), folder, trainer.processor)
    record.write(folder, recipe.as_dict(), seconds, chosen.type)
    return folder
