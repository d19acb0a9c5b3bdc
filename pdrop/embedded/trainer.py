"""The training loop's parts: one step, the running scores, the checkpoint."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batches import Batch, pack, prefix_ids
from .drawing import PATCH_HEADS
from .forward import Forward
from .model import TOWER_WIDTH, build
from .optimizer import Muon
from .recipe import RECIPE, Stage
from .samples import sample


class Trainer:
    """Model, patch heads and optimizer, and where in the recipe they are."""

    def __init__(self, recipe: tuple[Stage, ...] = RECIPE, seed: int = 0, compiled: bool = True) -> None:
        self.recipe = recipe
        self.model = build(seed)
        self.heads = nn.ModuleDict({name: nn.Linear(TOWER_WIDTH, size) for name, size in PATCH_HEADS.items()})
        self.forward = Forward(self.model, compiled)
        self.head_ids = prefix_ids()
        self.stage_index, self.step_index = 0, 0
        self.window = Window()
        self._begin()

    @property
    def stage(self) -> Stage:
        """The stage that the next step belongs to."""
        return self.recipe[self.stage_index]

    @property
    def finished(self) -> bool:
        """Whether the whole recipe is done."""
        return self.stage_index >= len(self.recipe)

    @property
    def images(self) -> int:
        """Images seen since the beginning; also the index of the next image in the train split."""
        return sum(stage.images for stage in self.recipe[: self.stage_index]) + (
            0 if self.finished else self.step_index * self.stage.batch
        )

    def _begin(self) -> None:
        """A fresh optimizer over what this stage trains."""
        named = []
        for name, weight in self.model.named_parameters():
            tower = "vision_tower" in name
            used = "post_layernorm" not in name and (self.stage.tower_rate > 0 if tower else self.stage.asks)
            weight.requires_grad_(used)
            if used:
                named.append((name, weight))
        if self.stage.patch_weight > 0:
            named += [(f"heads.{name}", weight) for name, weight in self.heads.named_parameters()]
        slower = self.stage.tower_rate or 1.0
        self.optimizer = Muon(named, self.stage.learning_rate, self.stage.adam_rate, slower)

    def batch(self) -> Batch:
        """The images of the next step."""
        stage, level = self.stage, self.stage.level(self.step_index)
        first = self.images
        pictures = [sample("train", first + offset, stage.mix, level, stage.retrieval) for offset in range(stage.batch)]
        return pack(pictures, stage.blocks, stage.families if stage.asks else {})

    def step(self) -> None:
        """One optimizer step; moves on to the next stage behind the last."""
        stage, batch = self.stage, self.batch()
        if stage.asks and self.step_index == 0 and not any(s.asks for s in self.recipe[: self.stage_index]):
            self._calm_tower(batch)
        with torch.set_grad_enabled(stage.tower_rate > 0):
            features = self.forward.features(batch.pixels)
        loss = torch.zeros(())
        if stage.asks:
            logits = self.forward.logits(features, self.head_ids, batch.ids, batch.positions, batch.mask, batch.rows)
            answers = F.cross_entropy(logits, batch.targets[batch.rows])
            loss = loss + answers
            self.window.add("loss", float(answers.detach()))
            self.window.add_answers(batch, logits.detach().argmax(-1))
        if stage.patch_weight > 0:
            loss = loss + stage.patch_weight * self._patch_loss(features, batch.patches)
        loss.backward()
        self.window.add("gradient", self.optimizer.step(stage.rate(self.step_index)))
        self.step_index += 1
        if self.step_index >= stage.steps:
            self.stage_index, self.step_index = self.stage_index + 1, 0
            if not self.finished:
                self._begin()

    @torch.no_grad()
    def _calm_tower(self, batch: Batch) -> None:
        """Scales the tower's residual stream so that its features have RMS 1; what the layers compute stays the same.

        Behind the patch labels the stream is ten times louder than word embeddings, and drowns them in the decoder.
        """
        rms = self.forward.features(batch.pixels).float().pow(2).mean().sqrt()
        for name, weight in self.model.named_parameters():
            writes = ("pre_layrnorm", "self_attn.out_proj", "mlp.fc2")
            if "vision_tower" in name and any(part in name for part in writes):
                weight.div_(rms)

    def _patch_loss(self, features: Tensor, patches: Tensor) -> Tensor:
        """Mean cross-entropy of the patch heads, empty patches counting little."""
        x = F.layer_norm(features, (TOWER_WIDTH,))
        losses = []
        for number, (name, head) in enumerate(self.heads.items()):
            logits = F.linear(x, *(weight.to(x.dtype) for weight in head.parameters())).flatten(0, 1).float()
            target = patches[:, number].flatten()
            weight = torch.ones(logits.shape[-1])
            weight[0] = 0.15
            losses.append(F.cross_entropy(logits, target, weight=weight))
            there = target > 0
            if there.any():
                hits = (logits.detach()[there].argmax(-1) == target[there]).float().mean()
                self.window.add(f"patch_{name}", float(hits))
        return torch.stack(losses).sum()

    def save(self, path: Path) -> None:
        """Writes a checkpoint, whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": None if self.finished else self.optimizer.state_dict(),
            "stage": self.stage_index,
            "step": self.step_index,
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        part.replace(path)

    def load(self, path: Path) -> None:
        """Goes on from a checkpoint of the same recipe."""
        state: dict[str, Any] = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.stage_index, self.step_index = state["stage"], state["step"]
        if not self.finished:
            self._begin()
            if self.step_index > 0:
                self.optimizer.load_state_dict(state["optimizer"])


class Window:
    """Means since the last time they were taken. Images are never seen twice, so they are unseen-data scores."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)

    def add(self, name: str, value: float) -> None:
        """One more value."""
        self._values[name].append(value)

    def add_answers(self, batch: Batch, predicted: Tensor) -> None:
        """Exact match per family; `predicted` int64 (n,) belongs to the rows with a target, in order."""
        right = torch.zeros(batch.targets.shape, dtype=torch.bool)
        right[batch.rows] = predicted == batch.targets[batch.rows]
        for span in batch.spans:
            hit = bool(right[span.image, span.block, span.first : span.last].all())
            self.add(span.question.family, float(hit))

    def take(self) -> dict[str, float]:
        """The means by name; starts anew."""
        means = {name: sum(values) / len(values) for name, values in self._values.items()}
        self._values.clear()
        return means
