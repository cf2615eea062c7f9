"""Training of mini-llava: the projector first, then projector and low-rank changes of the language model together.

The tower and the language model's own weights stay what they are; they run in bfloat16 where the hardware multiplies
it. Stage "align" asks every projected patch what it shows and where it is, and pulls it towards the words for it; the
language model does not run. Stage "coarse" answers packed questions from the means of 2 x 2 projected patches, stage
"joint" from all of them.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.errors import InputError
from vtc.eval.mini.adapter import LowRank, Projector, write_file
from vtc.eval.mini.build import GRID, ORIGIN
from vtc.eval.mini.features import MIX, Features, encoder
from vtc.eval.mini.naming import Naming
from vtc.eval.mini.settings import COARSE, Settings
from vtc.eval.mini.text import Text, Writer
from vtc.eval.mini.validation import measure
from vtc.eval.tiny import checkpoint, loop, sequence
from vtc.eval.tiny.family import Seen
from vtc.eval.tiny.heads import CellHeads
from vtc.eval.tiny.model import TRAINING_ATTENTION
from vtc.eval.tiny.packing import IGNORED
from vtc.eval.tiny.progress import Reporter
from vtc.eval.tiny.sample import Facts
from vtc.eval.tiny.settings import Stage
from vtc.eval.tiny.targets import cell_targets

ADAPTER = "adapter.safetensors"
LOG_EVERY = 20  # steps


@dataclass(frozen=True)
class MiniBatch:
    """Features (B, T, C) of pictures, what their patches show (B, 5, T), and behind stage "align" questions."""

    features: Tensor
    targets: Tensor
    text: Text | None


@dataclass
class MiniTrainer:
    """Frozen model, what is trained, and data of a run on one device."""

    settings: Settings
    out: Path
    device: torch.device
    model: Any
    writer: Writer
    naming: Naming
    projector: Projector
    low_rank: LowRank
    heads: CellHeads
    seen: Features
    checked: Features

    @classmethod
    def create(cls, settings: Settings, out: Path, device: torch.device, folder: Path) -> MiniTrainer:
        """Fresh trained parts from the seed; folder: a checkpoint that `vtc mini build` wrote."""
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        if not (folder / "config.json").is_file():
            raise InputError(
                f"{folder} holds no checkpoint; write one with vtc mini build --adapter none, and name it with --model"
            )
        origin = folder / ORIGIN
        if origin.is_file() and json.loads(origin.read_text())["adapter"]:
            raise InputError(
                f"{folder} holds a trained mini-llava, and what training writes is merged into an untrained one; write "
                "that with vtc mini build --adapter none"
            )
        processor = AutoProcessor.from_pretrained(folder)
        model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=loop.products(device))
        model.set_attn_implementation(TRAINING_ATTENTION)
        model = model.to(device).eval().requires_grad_(False)
        embeddings, text = model.get_input_embeddings().weight, model.model.language_model
        torch.manual_seed(settings.seed)
        projector = Projector(model.config.vision_config.hidden_size, embeddings.shape[1]).to(device)
        heads, low_rank = CellHeads(embeddings.shape[1], GRID).to(device), LowRank(text).to(device)
        low_rank.attach(text)
        encode = encoder(model, processor.image_processor)
        seen, checked = (Features(out / "features", split, encode) for split in ("train", "check"))
        projector.standardise(seen.read(range(min(50, settings.first)))[0].to(device))
        naming = Naming(processor.tokenizer, embeddings)
        writer = Writer(processor)
        return cls(settings, out, device, model, writer, naming, projector, low_rank, heads, seen, checked)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint holds."""
        return {"projector": self.projector, "low_rank": self.low_rank, "heads": self.heads}

    def trained(self, stage: Stage) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters that a stage updates."""
        names = [name for name in self.modules if stage.language or name != "low_rank"]
        return [(f"{name}.{part}", p) for name in names for part, p in self.modules[name].named_parameters()]

    def batch(self, index: int, step: int) -> MiniBatch:
        """Batch of a step of a stage; with questions, pictures are of one task."""
        settings, rng = self.settings, random.Random(f"{self.settings.seed} {index} {step}")
        there = settings.available(step + sum(stage.steps for stage in settings.stages[:index]))
        if not settings.stages[index].language:
            return self.make(self.seen, [rng.randrange(there) for _ in range(settings.batch_align)], None)
        kind, kinds = rng.randrange(len(MIX)), len(MIX)
        numbers = [rng.randrange(max(1, there // kinds)) * kinds + kind for _ in range(settings.batch_joint)]
        return self.make(self.seen, numbers, rng)

    def make(self, source: Features, numbers: list[int], rng: random.Random | None) -> MiniBatch:
        """These pictures, with questions, for which they have to be of one task, if there is a generator for them."""
        features, known = source.read(numbers)
        targets = torch.from_numpy(np.stack([square_targets(facts) for _, facts in known]))
        text = None if rng is None else self.writer.write(known[0][0], [facts for _, facts in known], rng)
        return MiniBatch(features.to(self.device), targets.to(self.device), text)

    def losses(self, batch: MiniBatch, stage: Stage) -> dict[str, Tensor]:
        """Unweighted losses of one batch."""
        with loop.mixed(self.device):
            rows = self.projector(batch.features)
            losses: dict[str, Tensor] = self.heads(Seen(rows, rows), batch.targets, batch.targets)
            losses |= self.naming.losses(rows, batch.targets)
            if batch.text is not None:
                hidden = self.hidden(rows, batch.text, stage)
                losses["answer"] = self._answer_loss(hidden, batch.text.labels.to(self.device))
        return losses

    def hidden(self, rows: Tensor, text: Text, stage: Stage) -> Tensor:
        """Last hidden states (B, T, hidden) of the packed questions behind pictures as a stage reads them."""
        if stage.name == COARSE:
            rows = F.avg_pool2d(rows.mT.reshape(*rows.mT.shape[:2], GRID, GRID), 2).flatten(2).mT
        embed, size = self.model.get_input_embeddings(), len(rows)

        def given(ids: list[int]) -> Tensor:
            embedded: Tensor = embed(torch.tensor(ids, device=self.device))
            return embedded.expand(size, -1, -1)

        asked = embed(text.ids.to(self.device))
        whole = torch.cat([given(self.writer.before), rows.to(asked.dtype), given(self.writer.after), asked], dim=1)
        prefix = whole.shape[1] - asked.shape[1]
        places = torch.cat([torch.arange(prefix), prefix + sequence.offsets(text.lengths)])
        output = self.model.model.language_model(
            inputs_embeds=whole,
            attention_mask=sequence.additive_mask(prefix, text.lengths, whole.dtype, self.device).expand(
                size, -1, -1, -1
            ),
            position_ids=places.to(self.device).expand(size, -1),
            use_cache=False,
            prefix=prefix,
        )
        last: Tensor = output.last_hidden_state[:, prefix:]
        return last

    def _answer_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of the answers, plus a little of the end tokens behind them."""
        asked = labels != IGNORED
        loss = F.cross_entropy(self.model.lm_head(hidden[asked]).float(), labels[asked], reduction="none")
        weight = torch.where(labels[asked] == self.writer.end, self.settings.end_weight, 1.0)
        return (loss * weight).sum() / weight.sum()

    def total(self, losses: dict[str, Tensor], stage: Stage) -> Tensor:
        """Weighted sum to minimise."""
        settings = self.settings
        dense = losses["content"] + losses["place"]
        dense = dense + settings.pull_weight * losses["pull"] + settings.size_weight * losses["size"]
        return losses["answer"] + settings.auxiliary_weight * dense if "answer" in losses else dense

    def measure(self, stage: Stage) -> dict[str, float]:
        """Accuracies on held-out pictures."""
        return measure(self, stage)


def square_targets(facts: Facts) -> Any:
    """What the patches of a picture that is padded to a square show, (5, GRID * GRID)."""
    height, width = facts.size
    side = max(height, width)
    left, top = (side - width) // 2, (side - height) // 2
    box = (float(-left), float(-top), float(side - left), float(side - top))
    return cell_targets(facts.pictures[0], box, GRID, GRID)


def train(
    out: Path,
    folder: Path,
    settings: Settings | None = None,
    device: str = "auto",
    threads: int = 0,
    save_every: int = 20,
    on_step: loop.StepHook = lambda stage, step: None,
) -> Path:
    """Train into `out`, or go on with the run that `out` holds; returns the file that `vtc mini build` merges.

    folder: a checkpoint that `vtc mini build --adapter none` wrote. The other arguments are those of
    `vtc.eval.tiny.train.train`.
    """
    settings, chosen = settings or Settings(), loop.pick_device(device)
    if threads > 0:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    with Reporter(out / "log.jsonl") as reporter:
        trainer = MiniTrainer.create(settings, out, chosen, folder)
        loop.run(trainer, reporter, save_every, on_step, LOG_EVERY)
    return export(out, out / ADAPTER)


def export(run: Path, path: Path) -> Path:
    """Write projector and low-rank changes of the last checkpoint of a run, which may go on, as a file of 11 MB.

    Raises InputError where the run has no checkpoint.
    """
    if not (run / checkpoint.NAME).is_file():
        raise InputError(f"{run} holds no checkpoint of a run; name the folder given to vtc mini train --out")
    state = torch.load(run / checkpoint.NAME, map_location="cpu", weights_only=True)
    weights = state["modules"]["projector"]
    projector = Projector(weights["linear_1.weight"].shape[1], weights["linear_1.weight"].shape[0])
    projector.load_state_dict(weights)
    settings, progress = Settings(**_own(state["settings"])), state["progress"]
    reached = settings.stages[progress["stage"]].name
    about = {"stage": reached, "step": str(progress["step"]), "seconds": str(round(progress["seconds"]))}
    write_file(path, projector, state["modules"]["low_rank"], about)
    return path


def _own(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "stages"}
