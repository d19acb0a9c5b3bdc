"""The parts of the training loop: one step, the checkpoint.

Several processes share the images of a step (torch.distributed, gloo) and average their gradients; each then takes the
same optimizer step. Each has one thread: two processes are faster than one with two threads.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pdrop.embedded.drawing import PATCH_HEADS
from pdrop.embedded.model import TOWER_WIDTH, WIDTH, build
from recipes.embedded.batches import Batch, prefix_ids
from recipes.embedded.forward import PackedForward
from recipes.embedded.loader import Place, Steps
from recipes.embedded.optimizer import Muon
from recipes.embedded.recipe import RECIPE
from recipes.embedded.stage import TrainingPhase
from recipes.embedded.window import Window


class Trainer:
    """Model, patch heads and optimizer on a device, and the step of the recipe that comes next."""

    def __init__(
        self,
        recipe: tuple[TrainingPhase, ...] = RECIPE,
        seed: int = 0,
        compiled: bool = True,
        device: str = "cpu",
    ) -> None:
        self.recipe, self.device = recipe, torch.device(device)
        self.rank, self.workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.check_workers(self.workers)
        self.data = Steps(recipe, self.rank, self.workers)
        self.model, self.heads, self.projector_heads = build(seed), _heads(TOWER_WIDTH), _heads(WIDTH)
        modules: tuple[nn.Module, ...] = (self.model, self.heads, self.projector_heads)
        for module in modules:
            module.to(self.device)
        self.forward = PackedForward(self.model, compiled)
        self.head_ids = prefix_ids().to(self.device)
        self.stage_index, self.step_index = 0, 0
        self.window = Window()
        self.initial_projector: nn.Module | None = None  # the projector as it was before the stage
        self._begin()

    def check_workers(self, workers: int) -> None:
        """Check that every process gets an image in every step.

        Raises:
            ValueError: If a stage has fewer.
        """
        least = min(self.recipe, key=lambda stage: stage.batch)
        if workers > least.batch:
            asked = f"the images of a step of the stage {least.name!r}, got {workers}"
            raise ValueError(f"processes must be at most {least.batch}, {asked}")

    @property
    def stage(self) -> TrainingPhase:
        """The stage that the next step belongs to."""
        return self.recipe[self.stage_index]

    @property
    def finished(self) -> bool:
        """Whether the recipe's last step is done."""
        return self.stage_index >= len(self.recipe)

    @property
    def place(self) -> Place:
        """The place of the next step in the recipe."""
        return Place(self.stage_index, self.step_index)

    @property
    def images(self) -> int:
        """Images seen since the beginning; also the index of the next image in the train split."""
        return self.data.first_image(self.place)

    def _begin(self) -> None:
        """Begin a stage: a fresh optimizer over the parameters that it trains."""
        named = []
        for name, weight in self.model.named_parameters():
            if "vision_tower" in name:
                used = self.stage.tower_rate > 0 and "post_layernorm" not in name
            elif "multi_modal_projector" in name:
                used = self.stage.trains_decoder or self.stage.projector_weight > 0
            else:
                used = self.stage.trains_decoder
            weight.requires_grad_(used)
            if used:
                named.append((name, weight))
        if self.stage.patch_weight > 0:
            named += [(f"heads.{name}", weight) for name, weight in self.heads.named_parameters()]
        if self.stage.projector_weight > 0:
            named += [(f"heads.projector.{name}", weight) for name, weight in self.projector_heads.named_parameters()]
        tower_scale = self.stage.tower_rate or 1.0
        self.optimizer = Muon(named, self.stage.learning_rate, self.stage.adam_rate, tower_scale)

    def batch(self) -> Batch:
        """This process's images of the next step."""
        return self.data[self.data.number(self.place)].to(self.device)

    def step(self, batch: Batch) -> None:
        """One optimizer step on this process's images, `batch()`; the last one of a stage moves on to the next."""
        stage = self.stage
        if self.step_index == 0:
            self._normalize_tower(batch)
            self._prepare_projector(batch)
        self.loss(batch).backward()
        self._share_gradients()
        self.window.add("gradient", self.optimizer.step(stage.rate(self.step_index)))
        self.step_index += 1
        if self.step_index >= stage.steps:
            self.stage_index, self.step_index = self.stage_index + 1, 0
            if not self.finished:
                self._begin()

    def loss(self, batch: Batch) -> Tensor:
        """The stage's loss on this process's images, in nats, a scalar; scores are added to `window`."""
        stage, loss = self.stage, torch.zeros((), device=self.device)
        with torch.set_grad_enabled(stage.tower_rate > 0):
            features = self.forward.features(batch.pixels)
        if stage.trains_decoder:
            visual, asked = self.forward.hidden(features, self.head_ids, batch.ids, batch.positions, batch.mask)
            logits = self.forward.words(asked[batch.rows])
            answers = F.cross_entropy(logits, batch.targets[batch.rows])
            loss = loss + answers
            if stage.character_weight > 0:
                loss = loss + stage.character_weight * self._character_loss(visual, batch.character_targets)
            self.window.add("loss", float(answers.detach()))
            self.window.add_answers(batch, logits.detach().argmax(-1))
        if stage.patch_weight > 0:
            loss = loss + stage.patch_weight * self._patch_loss(features, self.heads, batch.patches)
        if stage.projector_weight > 0:
            projected = self.forward.projected(features)
            loss = loss + stage.projector_weight * self._patch_loss(projected, self.projector_heads, batch.patches)
            if self.initial_projector is not None:
                with torch.no_grad():
                    before = self.initial_projector(features.float())
                moved = (projected - before).pow(2).mean() / before.pow(2).mean()
                self.window.add("moved", float(moved.detach()))
                loss = loss + stage.drift_weight * moved
        return loss

    def _share_gradients(self) -> None:
        """Average the gradients over all processes; each counts the same, however many answers it had."""
        if self.workers == 1:
            return
        weights = self.optimizer.parameters
        flat = torch.cat([(torch.zeros_like(w) if w.grad is None else w.grad).flatten() for w in weights])
        dist.all_reduce(flat)
        for weight, part in zip(weights, flat.div_(self.workers).split([w.numel() for w in weights])):
            weight.grad = part.view_as(weight)

    @torch.no_grad()
    def _normalize_tower(self, batch: Batch) -> None:
        """Scales the tower's features to RMS 1 before anything is trained on them; its layers normalise their inputs,
        so nothing else changes.

        After training on patch labels, the features are ten times as large as word embeddings, which then hardly count
        in the decoder.
        """
        before = self.recipe[: self.stage_index]
        if (
            not before
            or before[-1].tower_rate == 0
            or self.stage.tower_rate > 0
            or any(one.trains_decoder for one in before)
        ):
            return
        rms = self._rms(self.forward.features(batch.pixels))
        for name, weight in self.model.named_parameters():
            writes = ("pre_layrnorm", "self_attn.out_proj", "mlp.fc2")
            if "vision_tower" in name and any(part in name for part in writes):
                weight.div_(rms)

    @torch.no_grad()
    def _prepare_projector(self, batch: Batch) -> None:
        """Scales the projector's output, and keeps a copy of the projector if its output is to stay near that."""
        if self.stage.projector_rms > 0:
            rms = self._rms(self.forward.projected(self.forward.features(batch.pixels)))
            last = self.model.model.multi_modal_projector.linear_2
            for weight in (last.weight, last.bias):
                weight.mul_(self.stage.projector_rms / rms)
        self.initial_projector = (
            copy.deepcopy(self.model.model.multi_modal_projector).float() if self.stage.drift_weight > 0 else None
        )

    def _rms(self, features: Tensor) -> Tensor:
        """Root mean square, a scalar, over the images of all processes."""
        square = features.float().pow(2).mean()
        if self.workers > 1:
            dist.all_reduce(square)
        return (square / self.workers).sqrt()

    def _character_loss(self, visual: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of the characters of codes at the tokens that show them; 0 without any."""
        there = targets >= 0
        if not there.any():
            return torch.zeros((), device=self.device)
        logits = self.forward.words(visual[there])
        self.window.add("spelled", float((logits.detach().argmax(-1) == targets[there]).float().mean()))
        return F.cross_entropy(logits, targets[there])

    def _patch_loss(self, features: Tensor, heads: nn.ModuleDict, patches: Tensor) -> Tensor:
        """Mean cross-entropy of the patch heads on normalized features; empty patches have a small weight."""
        x = F.layer_norm(features, features.shape[-1:])
        losses = []
        for number, (name, head) in enumerate(heads.items()):
            logits = F.linear(x, *(weight.to(x.dtype) for weight in head.parameters())).flatten(0, 1).float()
            target = patches[:, number].flatten()
            weight = torch.ones(logits.shape[-1], device=self.device)
            weight[0] = 0.15
            losses.append(F.cross_entropy(logits, target, weight=weight))
            there = target > 0
            if there.any():
                hits = (logits.detach()[there].argmax(-1) == target[there]).float().mean()
                self.window.add(f"patch_{name}", float(hits))
        return torch.stack(losses).sum()

    def save(self, path: Path) -> None:
        """Writes a checkpoint in one step: a kill leaves the old one or the new one."""
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "projector_heads": self.projector_heads.state_dict(),
            "initial_projector": None if self.initial_projector is None else self.initial_projector.state_dict(),
            "optimizer": None if self.finished else self.optimizer.state_dict(),
            "stage": self.stage_index,
            "step": self.step_index,
            "begun": _begun(self.recipe, self.stage_index),
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        part.replace(path)

    def load(self, path: Path) -> None:
        """Continues from a checkpoint; see `read_checkpoint`."""
        state = read_checkpoint(path, self.recipe, self.device)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.projector_heads.load_state_dict(state["projector_heads"])
        self.stage_index, self.step_index = state["stage"], state["step"]
        if state["initial_projector"] is not None:
            self.initial_projector = copy.deepcopy(self.model.model.multi_modal_projector)
            self.initial_projector.load_state_dict(state["initial_projector"])
        if not self.finished:
            self._begin()
            if self.step_index > 0:
                self.optimizer.load_state_dict(state["optimizer"])


def read_checkpoint(path: Path, recipe: Sequence[TrainingPhase], device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what `Trainer.save` wrote. Stages that had not begun then may have changed since.

    Raises:
        ValueError: If it was made with another recipe.
    """
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    if state.get("begun") != _begun(recipe, state["stage"]):
        raise ValueError(f"{path} is of another recipe: move it away, or choose another folder with --work")
    return state


def _begun(recipe: Sequence[TrainingPhase], stage: int) -> str:
    """The stages up to number `stage` as text, to compare recipes by."""
    return repr(tuple(recipe[: stage + 1]))


def _heads(width: int) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(width, size) for name, size in PATCH_HEADS.items()})
