"""The batches of a recipe's steps in order, made in this process or in advance by loader processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch.utils.data import DataLoader, Dataset

from pdrop.embedded.samples import sample
from recipes.embedded.batches import Batch, pack
from recipes.embedded.stage import TrainingPhase

_PREFETCH = 2  # batches that each loader process has ready, 3.4 MB of shared memory each


class Place(NamedTuple):
    """The place of a step in a recipe: the number of its stage, and its own number inside the stage."""

    stage: int
    step: int


class Steps(Dataset[Batch]):
    """The batches of a recipe by the number of their step; a batch is the same whichever process makes it.

    Process number `rank` of `workers` gets its share of each step's images.
    """

    def __init__(self, recipe: Sequence[TrainingPhase], rank: int = 0, workers: int = 1) -> None:
        self.recipe, self.rank, self.workers = tuple(recipe), rank, workers

    def __len__(self) -> int:
        return sum(stage.steps for stage in self.recipe)

    def place(self, number: int) -> Place:
        """Where step `number` is.

        Raises:
            IndexError: If there is no such step.
        """
        for index, stage in enumerate(self.recipe):
            if number < stage.steps:
                return Place(index, number)
            number -= stage.steps
        raise IndexError(f"the recipe has {len(self)} steps")

    def number(self, place: Place) -> int:
        """The number of the step at a place, the inverse of `place`."""
        return sum(stage.steps for stage in self.recipe[: place.stage]) + place.step

    def first_image(self, place: Place) -> int:
        """Index in the train split of the step's first image: the number of images before it."""
        before = sum(stage.images for stage in self.recipe[: place.stage])
        return before + (place.step * self.recipe[place.stage].batch if place.stage < len(self.recipe) else 0)

    def __getitem__(self, number: int) -> Batch:
        place = self.place(number)
        stage, first = self.recipe[place.stage], self.first_image(place)
        level, mine = stage.level(place.step), range(self.rank, stage.batch, self.workers)
        pictures = [sample("train", first + offset, stage.mix, level, stage.drills) for offset in mine]
        return pack(pictures, stage.blocks, stage.families if stage.trains_decoder else {}, stage.hinted)


def batches(steps: Steps, first: int, loader_workers: int = 0) -> Iterator[Batch]:
    """The batches from step `first` to the recipe's end, in order, made by `loader_workers` processes (0: this one)."""
    prefetch = _PREFETCH if loader_workers else None
    order = range(first, len(steps))
    yield from DataLoader(steps, batch_size=None, sampler=order, num_workers=loader_workers, prefetch_factor=prefetch)
