"""SparseVLM v1: the rank of the raters' attention says how many tokens stay (arXiv 2410.04417, section 3.3; the first
released code, 91fb6d9). This is the paper's algorithm; its ICML numbers are v1.5's (pdrop/methods/sparsevlm.py).

The attention of the raters to the visual tokens, mean over heads, is a matrix of raters x visual tokens. Its rank times
`scale` plus `bias` is the number that stays; if the rank is the number of visual tokens, nothing goes. Rating,
ranking, recycling and positions are v1.5's, and so are the differences listed there. Boundaries are 3, 7, 16 and 20 of
32 layers. Published for 576 tokens: scale 13.5, bias 0 ("192"); 9, 6 ("128"); 0.8, 0 ("64").

The rank is at most the number of raters, and usually equals it: attention rows of different tokens are hardly ever
linearly dependent. So v1 keeps more tokens for longer questions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pdrop.methods.base import AttentionRows, Ranking, View
from pdrop.methods.sparsevlm import SparseVLM, most_raters, raters_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SparseVLMV1(SparseVLM):
    """SparseVLM v1. At adaptive stages min(int(rank * scale + bias), tokens - 1) stay, prompt by prompt.

    Attributes:
        scale: Tokens kept for each unit of rank.
        bias: Tokens kept in addition.
    """

    scale: float = 13.5
    bias: float = 0.0
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale < 0:
            raise ValueError(f"scale is a number of tokens for each unit of rank, from 0 on, not {self.scale!r}")

    def score(self, view: View) -> Tensor | Ranking:  # type: ignore[override]
        """Mean over heads and raters of the attention probabilities, [B, T]; with how many stay."""
        import torch

        rows = view.attention_rows(raters_of(view), most_raters(view))
        if view.stage is None or not view.stage.adaptive:
            return rows.mean()
        stays = [
            n if rank == n else max(0, min(int(rank * self.scale + self.bias), n - 1))
            for n, rank in zip(view.visual_counts, self.ranks(view, rows))
        ]
        return Ranking(rows.mean(), torch.tensor(stays))  # on the host, where they are read

    def ranks(self, view: View, rows: AttentionRows) -> list[int]:
        """Rank of each prompt's matrix of raters x visual tokens, computed on its own rows: the same in any batch.

        In float64 on the host, from one copy, with float32's threshold: a rank is worth many tokens, and the libraries
        of devices need not agree on the smallest singular values.
        """
        import torch

        seen, visual = rows.probabilities.mean(1), (view.visual & view.valid)[:, None].float()  # [B, Q, T], [B, 1, T]
        asks = torch.nn.functional.pad(rows.asks.float(), (0, 1))[..., None]  # [B, Q + 1, 1]
        copied = torch.cat([torch.cat([seen, visual], 1), asks], 2).cpu()
        found = []
        for one in copied:
            matrix = one[:-1][one[:-1, -1].bool()][:, one[-1].bool()].double()
            threshold = max(matrix.shape) * torch.finfo(torch.float32).eps
            found.append(int(torch.linalg.matrix_rank(matrix, rtol=threshold)) if matrix.numel() else 0)
        return found
