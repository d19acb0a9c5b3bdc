"""PyramidDrop's schedules for the budgets usual in the literature: 192, 128 and 64 average tokens of 576.

pyramiddrop(num_layers=32, budget=192)      # Schedule('2:0.581 8:0.337561 16:0.196122941 24:0.113947428721')
"""

from __future__ import annotations

from collections.abc import Sequence

from pdrop.schedule import Schedule, pyramid

# The ratio at each of four boundaries, from STAR-Pro's re-runs for 32 and 40 layers: the named number of 576
# tokens enters a layer on average. The paper's own boundaries, 8, 16 and 24, cannot go below 144.
RATIOS = {192: 0.5810, 128: 0.4371, 64: 0.1960}
RATIOS_OF_40 = {192: 0.586, 128: 0.448, 64: 0.225}


def pyramiddrop(num_layers: int = 32, budget: int = 192, layers: Sequence[int] | None = None) -> Schedule:
    """PyramidDrop at a named budget: boundaries 2, 8, 16 and 24 of 32 layers, 2, 10, 20 and 30 of 40.

    Args:
        num_layers: Layers of the decoder; other depths have boundaries at 2 and the quarters, and the ratio for 32. The
            average number of tokens is then near the budget's name, and tables show it.
        budget: Its name, 192, 128 or 64.
        layers: Other boundaries.

    Raises:
        ValueError: If there is no such budget, or the boundaries do not fit the layers.
    """
    if budget not in RATIOS:
        raise ValueError(
            f"budget is one of {', '.join(map(str, RATIOS))}, not {budget!r}: others by budget=avg_tokens:N"
        )
    quarter = num_layers // 4
    own = sorted({2, quarter, 2 * quarter, 3 * quarter}) if layers is None else layers
    return pyramid(num_layers, ratio=(RATIOS_OF_40 if num_layers == 40 else RATIOS)[budget], layers=own)
