"""The two controls that thin out the picture's grid without looking at it: `Uniform` picks, `Pool` averages.

Both reduce a grid of h x w tokens to round(h sqrt(keep)) x round(w sqrt(keep)), so at the same `keep` they have equally
many tokens: 24 x 24 at 0.25 gives 12 x 12. Every picture, tile and frame of a prompt has its own grid and so its own
share; newline tokens are thinned out with their rows. Meant for the language model's input (boundary 0), where Wen et
al. found pooling ahead of rankings by attention (arXiv 2502.11501); deeper boundaries work as well.

A prompt that ends in its image is refused: its last token must stay, and no grid is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from pdrop.methods.base import Merged, Method, Positions, View
from pdrop.methods.layout import TokenGrid, reduced_count, square
from pdrop.methods.transfer import moved, on_device
from pdrop.schedule import Schedule, Stage, single
from pdrop.shapes import PromptSize

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Gridded(Method):
    """What `Uniform` and `Pool` share: how many tokens a grid is thinned out to."""

    positions: Positions = field(default="compact", kw_only=True)
    ranks_by_attention: ClassVar[bool] = False
    one_boundary: ClassVar[bool] = True

    def count(self, stage: Stage, visual: int) -> int:
        """Tokens of the reduced grid, for one square picture (one row, where `visual` is not a square)."""
        return reduced_count(square(visual), share(stage, visual))

    def counts(self, view: View, visual: Sequence[int]) -> list[int]:
        """Tokens of the reduced grids of each prompt; all tokens if nothing goes.

        Raises:
            ValueError: If a prompt ends in its image.
        """
        if any(view.pinned):
            raise ValueError(f"{type(self).__name__} needs text after the image, whose last token it cannot spare")
        shares = [share(view.stage, n) for n in visual]
        return [n if keep >= 1 else reduced_count(grids, keep) for n, grids, keep in zip(visual, view.images, shares)]

    def entering(self, schedule: Schedule, prompt: PromptSize, num_layers: int) -> list[float]:
        """Each crop and frame has its own share if the grids are known."""
        if not prompt.grids:
            return super().entering(schedule, prompt, num_layers)
        grids, left = (
            [TokenGrid(0, height, width, width) for height, width in prompt.grids],
            [prompt.visual] * num_layers,
        )
        for stage in schedule.check(num_layers):
            if (keep := share(stage, round(prompt.visual))) < 1:
                left[stage.layer :] = [float(reduced_count(grids, keep))] * (num_layers - stage.layer)
        return left

    def dial(self, ratio: float, num_layers: int, layers: Sequence[int] | None = None) -> Schedule:
        """One cut before the decoder."""
        return single(0, ratio, num_layers, layers)


@dataclass(frozen=True)
class Uniform(Gridded):
    """The token in the middle of each block of the grid stays."""

    def plan(self, view: View, visual: Sequence[int]) -> list[tuple[int, int]]:
        """As many as the reduced grids have."""
        return [(n, 0) for n in self.counts(view, visual)]

    def score(self, view: View) -> Tensor:
        """1 for tokens of the reduced grids, 0 for others, [B, T]."""
        import torch

        at = in_order(view)
        wanted = torch.zeros(at.shape, dtype=torch.float32)
        for row, (grids, n) in enumerate(zip(view.images, view.visual_counts)):
            for grid in grids:
                blocks = grid.blocks(share(view.stage, n))
                wanted[row, [grid.token(middle(rows), middle(columns)) for rows, columns in blocks]] = 1
        return torch.zeros_like(view.index, dtype=torch.float32).scatter(1, at, moved(wanted, at.device))


@dataclass(frozen=True)
class Pool(Gridded):
    """The mean of each block of the grid, at the place of the block's last token."""

    def plan(self, view: View, visual: Sequence[int]) -> list[tuple[int, int]]:
        """None stays as it is; as many are made as the reduced grids have tokens."""
        return [(n, 0) if made == n else (0, made) for n, made in zip(visual, self.counts(view, visual))]

    def score(self, view: View) -> Tensor:
        """Zeros, [B, T]: none stays."""
        return view.hidden.new_zeros(view.index.shape).float()

    def merge(self, view: View, scores: Tensor, goes: Tensor, going: list[int]) -> Merged:
        """Adaptive average pooling of each grid to its reduced size."""
        import torch

        at = in_order(view)
        batch, width, size = view.hidden.shape
        keeps = [share(view.stage, n) if n else 0.0 for n in going]
        blocks = [
            [
                [grid.token(row, column) for row in rows for column in columns]
                for grid in grids
                for rows, columns in grid.blocks(keep)
            ]
            for grids, keep in zip(view.images, keeps)
        ]
        most = max(map(len, blocks))
        weights, centres = torch.zeros(batch, most, at.shape[1]), torch.zeros(batch, most, dtype=torch.long)
        states = view.hidden.new_zeros(batch, most, size)
        for prompt, (lists, grids, keep) in enumerate(zip(blocks, view.images, keeps)):
            for number, tokens in enumerate(lists):
                weights[prompt, number, tokens] = 1 / len(tokens)
                centres[prompt, number] = tokens[-1]
            if lists:
                visual = view.hidden[prompt, at[prompt]]
                states[prompt, : len(lists)] = torch.cat([pooled(visual, grid, keep) for grid in grids])
        spread = torch.zeros(batch, most, width, device=at.device)
        spread = spread.scatter(2, at[:, None].expand(-1, most, -1), moved(weights, at.device))
        places = at.gather(1, moved(centres, at.device))
        return Merged(states, places, spread, after=places)


def share(stage: Stage | None, visual: int) -> float:
    """The share of a prompt's visual tokens that stays from a stage on."""
    assert stage is not None
    if stage.keep is not None:
        return stage.keep
    return min(1.0, (stage.tokens or 0) / visual) if visual else 0.0


def middle(numbers: range) -> int:
    """The middle number; for an even count, the second of the two in the middle."""
    return numbers[len(numbers) // 2]


def in_order(view: View) -> Tensor:
    """Places of each prompt's visual tokens among those alive, [B, most]; past a prompt's last, any others."""
    return view.visual.int().argsort(dim=1, descending=True, stable=True)[:, : max(view.visual_counts)]


def pooled(visual: Tensor, grid: TokenGrid, keep: float) -> Tensor:
    """Adaptive average pooling of a grid, [tokens of the reduced grid, D], from all visual tokens [N, D]."""
    import torch

    tokens = on_device(grid.tokens(), visual.device)
    image = visual[tokens].view(grid.height, grid.width, -1).permute(2, 0, 1)
    return torch.nn.functional.adaptive_avg_pool2d(image, grid.reduced(keep)).flatten(1).T
