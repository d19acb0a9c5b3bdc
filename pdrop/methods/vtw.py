"""VTW: all visual tokens are withdrawn at one layer (arXiv 2405.05803, "Boosting Multimodal Large Language Models with
Visual Tokens Withdrawal for Rapid Inference"; its code, lzhxmu/VTW at a3d8cfc).

Nothing is ranked; the only parameter is the layer: 15 of 32 in that repository's README (270 average tokens of 576), 16
in its command line (288). `pdrop.runs.calibration.withdrawal_layer` searches for it as the paper does.

Where this differs from the published code:
- every picture of a prompt goes; that code withdraws as many tokens as the LAST picture has, starting where the FIRST
  begins;
- a query token stays, even if it is visual; each prompt of a batch loses its own pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pdrop.methods.base import Method, View
from pdrop.schedule import Schedule, check_ratio, single

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class VTW(Method):
    """Ranks nothing; for a schedule that keeps nothing from its layer on."""

    ranks_by_attention: ClassVar[bool] = False
    one_boundary: ClassVar[bool] = True

    def score(self, view: View) -> Tensor:
        """Zeros, [B, T]."""
        return view.hidden.new_zeros(view.index.shape).float()

    def dial(self, ratio: float, num_layers: int, layers: Sequence[int] | None = None) -> Schedule:
        """The layer at that share of the depth: the ratio is the share of average tokens."""
        return vtw(num_layers, ratio, layers)


def vtw(num_layers: int, ratio: float = 0.5, layers: Sequence[int] | None = None) -> Schedule:
    """Withdraw at layer round(ratio * num_layers), so that `ratio` is the average share of tokens.

    Args:
        num_layers: Layers of the decoder.
        ratio: 0.5 of 32 layers is layer 16; 15 is layers=[15].
        layers: The layer itself, as a list of one.

    Raises:
        ValueError: If the ratio is no fraction, or there is not exactly one layer.
    """
    check_ratio(ratio)
    at = round(ratio * num_layers)
    return Schedule() if layers is None and at >= num_layers else single(at, 0.0, num_layers, layers)
