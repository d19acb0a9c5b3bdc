"""A stage of the embedded model's training: images, questions, what is trained, and at which rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pdrop.embedded.drills import Drill
from pdrop.embedded.samples import BENCHMARK, MIX
from pdrop.embedded.scenes import Level


@dataclass(frozen=True)
class TrainingPhase:
    """One stage. `learning_rate` is Muon's, `adam_rate` AdamW's; both warm up over `warm_up` steps and fall linearly
    to `floor` of their height over the last `decay` of the stage."""

    name: str
    images: int
    batch: int = 32
    mix: Mapping[str, float] = field(default_factory=lambda: MIX)
    families: Mapping[str, float] | None = None  # fraction of each family's questions that is asked; None: all
    blocks: int = 6  # rows of questions per image, in blocks
    trains_decoder: bool = True  # False: the decoder is not trained
    hinted: bool = False  # with intermediate targets inside the questions (hints.py)
    drills: Mapping[Drill, float] = field(
        default_factory=dict
    )  # fraction of the scenes (documents) with a drill's questions
    start: Level = BENCHMARK  # images at the beginning; grows to BENCHMARK over the first `growth` of the stage
    growth: float = 0.0
    tower_rate: float = 0.0  # the tower's learning rate as a multiple of the others'; 0 freezes it
    patch_weight: float = 0.0  # weight of the patch labels' loss; the answers' has 1
    projector_weight: float = 0.0  # the same after the projector
    drift_weight: float = 0.0  # weight of how far the projector's output moves from what it was before the stage
    projector_rms: float = 0.0  # RMS that the projector's output is scaled to before the stage; 0: not scaled
    character_weight: float = 0.0  # weight of the characters' names at the visual tokens' own rows after the last layer
    learning_rate: float = 0.02
    adam_rate: float = 2e-3
    warm_up: int = 60
    decay: float = 0.3
    floor: float = 0.05

    @property
    def steps(self) -> int:
        return self.images // self.batch

    def rate(self, step: int) -> float:
        """The factor of the learning rates at a step (from 0)."""
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return min((step + 1) / self.warm_up, 1.0, max(self.floor, left))

    def level(self, step: int) -> Level:
        """How hard the images of a step are."""
        grown = 1.0 if self.growth <= 0 else min(1.0, step / (self.growth * self.steps))
        if grown >= 1 and not self.start.distinct:
            return BENCHMARK

        def between(low: tuple[int, int], high: tuple[int, int]) -> tuple[int, int]:
            return (low[0] + int(grown * (high[0] - low[0])), low[1] + int(grown * (high[1] - low[1])))

        first, last = self.start, BENCHMARK
        return Level(
            objects=between(first.objects, last.objects),
            distinct=first.distinct,
            sign=first.sign + grown * (last.sign - first.sign),
            characters=between(first.characters, last.characters),
            rows=between(first.rows, last.rows),
            bars=between(first.bars, last.bars),
            plates=between(first.plates, last.plates),
        )
