"""Running scores of the embedded model's training."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from recipes.embedded.batches import Batch


class Window:
    """Means since they were last taken. No image is seen twice, so these are scores on unseen images."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)

    def add(self, name: str, value: float) -> None:
        self._values[name].append(value)

    def add_answers(self, batch: Batch, predicted: Tensor) -> None:
        """Exact match per family; `predicted` int64 (n,) belongs to the rows with a target, in order."""
        right = torch.zeros_like(batch.rows)
        right[batch.rows] = predicted == batch.targets[batch.rows]
        right = right.cpu()
        for span in batch.spans:
            hit = bool(right[span.image, span.block, span.first : span.last].all())
            self.add(span.question.family, float(hit))

    def take(self) -> dict[str, float]:
        """The means by name; starts new ones."""
        means = {name: sum(values) / len(values) for name, values in self._values.items()}
        self._values.clear()
        return means
