"""V2Drop: the tokens changed least by the previous layer go (arXiv 2509.01552, "Variation-aware Vision Token Dropping
for Faster Large Vision-Language Models"; its code, xuyang-liu16/V2Drop at 219e03e).

Tokens are ranked by the norm of the difference between output and input of the layer before the boundary. Boundaries 3,
17 and 22 of 32 layers keep 0.5, 0.5 and 0 of what is LEFT, here 0.5, 0.25 and 0 of the original number: 288 and 144 of
576. "0" is one token in that code, and here. For Qwen2-VL it has layers 3, 16 and 22 with 0.25, 0.0125 and 0.

Where this differs from the published code:
- a query token stays, also where it is visual (a prompt that ends in its picture);
- text is never dropped; that code takes a text-only prompt of 611 tokens or more for one with a picture;
- each prompt of a batch is ranked by its own tokens; that code ranks the first for all.
The released code raises an IndexError on the transformers that it pins (rotary tables cut at the layer's own length).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pdrop.methods.base import Method, View
from pdrop.schedule import Schedule, Stage, check_ratio

if TYPE_CHECKING:
    from torch import Tensor

BOUNDARIES = (3, 17, 22)  # of 32


@dataclass(frozen=True)
class V2Drop(Method):
    """Change by the previous layer. Keeps int(n * keep) tokens, and at least one."""

    observe: ClassVar[int] = -1
    ranks_by_attention: ClassVar[bool] = False

    def count(self, stage: Stage, visual: int) -> int:
        """int(n * keep), at least 1."""
        return min(visual, max(1, super().count(stage, visual)))

    def score(self, view: View) -> Tensor:
        """Euclidean length of the change, [B, T]."""
        assert view.output is not None
        moved: Tensor = view.output.detach().to(view.hidden.device) - view.hidden.detach()
        far: Tensor = moved.float().norm(dim=-1)
        return far

    def dial(self, ratio: float, num_layers: int, layers: Sequence[int] | None = None) -> Schedule:
        """Three boundaries that keep the ratio, half of it, and one token."""
        return v2drop(num_layers, ratio, layers)


def v2drop(num_layers: int, ratio: float = 0.5, layers: Sequence[int] | None = None) -> Schedule:
    """The published schedule, scaled: `ratio` at the first boundary, half of it at the second, one token at the third.

    Args:
        num_layers: Layers of the decoder; if they are not 32, boundaries are in proportion.
        ratio: Share of the original tokens that stays at the first boundary; 0.5 is the published one.
        layers: Other boundaries; each but the last keeps half of the one before it.

    Raises:
        ValueError: If the ratio is not a fraction, or the boundaries do not fit the layers.
    """
    check_ratio(ratio)
    at = layers or sorted({max(1, round(boundary * num_layers / 32)) for boundary in BOUNDARIES})
    keeps = [ratio * 0.5**number for number in range(len(at) - 1)] + [0.0]
    return Schedule(tuple(Stage(layer, keep) for layer, keep in zip(at, keeps))).check(num_layers)
