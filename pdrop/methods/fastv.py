"""FastV: rank once, by the attention of the layer before the cut (arXiv 2403.06764, "An Image is Worth 1/2
Tokens After Layer 2", section 3).

Layers 0..K-1 see everything; what enters layer K is chosen by the attention that the last token pays in layer K-1.
The paper's text averages over all query rows, its code takes the last token's row; this follows the code, in the
variant that prunes once, at prefill, and keeps the original positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pdrop.methods.base import Method, View
from pdrop.schedule import Schedule, Stage, single

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FastV(Method):
    """Attention from the query tokens in layer K-1; keeps round(n * keep) tokens, halves to even as Python rounds.

    Attributes:
        several: True: apply its ranking at each boundary of any schedule, which is no longer the published method.
    """

    observe: int = field(default=-1, kw_only=True)  # type: ignore[misc]
    several: bool | None = field(default=None, kw_only=True)

    @property
    def one_boundary(self) -> bool:  # type: ignore[override]
        """Whether its schedule has one boundary only: FastV prunes once."""
        return not self.several

    def count(self, stage: Stage, visual: int) -> int:
        """round(n * keep), the rule of the authors' implementation for transformers models (25 at 0.5 -> 12)."""
        return super().count(stage, visual) if stage.keep is None else round(visual * stage.keep)

    def score(self, view: View) -> Tensor:
        """Mean over heads (and query tokens) of the attention probabilities, [B, T]."""
        return view.attention()

    def check(self, schedule: Schedule) -> None:
        """As `Method.check`; for several boundaries the message also names `several`."""
        if self.one_boundary and len(schedule) > 1:
            raise ValueError(
                f"FastV prunes once: give it one boundary (layers=[2]), not {schedule}; its ranking at several of them "
                "is a method of your own, FastV(several=True)"
            )
        super().check(schedule)

    def dial(self, ratio: float, num_layers: int, layers: Sequence[int] | None = None) -> Schedule:
        """One boundary before layer 2."""
        return single(2, ratio, num_layers, layers)
