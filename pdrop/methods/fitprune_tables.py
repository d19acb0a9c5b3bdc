"""FitPrune's published tables of how many tokens go in each layer, and their interpolation.

fitprune(num_layers=32, reduction=60)       # Schedule('1:562t 2:529t 3:440t ...')
"""

from __future__ import annotations

from collections.abc import Sequence

from pdrop.schedule import Schedule, Stage, check_ratio

# Visual tokens that FitPrune's published tables (its code at d28e418) take away in each of 32 layers, of 576, by the
# share of FLOPs that goes, in per cent. (On average 541, 493, 424, 363, 302, 274, 245, 188, 131 and 73 enter a layer.)
# fmt: off
FITPRUNE = {
    10: (0, 0, 1, 2, 1, 0, 1, 4, 5, 5, 11, 4, 2, 2, 0, 0, 1, 1, 2, 4, 2, 10, 1, 1, 1, 2, 1, 1, 0, 1, 0, 0),
    20: (0, 0, 3, 3, 1, 1, 4, 16, 14, 15, 24, 4, 2, 3, 2, 0, 6, 0, 5, 13, 4, 19, 2, 1, 1, 1, 1, 1, 2, 1, 0, 0),
    30: (0, 0, 7, 6, 4, 5, 16, 40, 24, 21, 24, 4, 2, 3, 4, 0, 16, 0, 11, 26, 6, 32, 3, 1, 0, 1, 2, 2, 4, 0, 0, 0),
    40: (0, 1, 21, 13, 14, 11, 41, 53, 29, 15, 14, 5, 1, 4, 5, 1, 26, 1, 13, 28, 6, 27, 2, 1, 0, 0, 1, 1, 2, 0, 0, 0),
    50: (3, 7, 49, 24, 29, 17, 59, 41, 26, 8, 10, 6, 2, 5, 7, 2, 30, 3, 13, 27, 5, 23, 2, 1, 0, 0, 1, 1, 2, 0, 0, 0),
    55: (6, 17, 69, 31, 34, 19, 59, 30, 23, 6, 8, 7, 2, 5, 8, 2, 29, 4, 12, 25, 4, 19, 2, 1, 0, 0, 1, 0, 1, 0, 0, 0),
    60: (14, 33, 89, 36, 36, 20, 55, 21, 18, 4, 7, 5, 2, 5, 7, 4, 26, 5, 11, 24, 4, 18, 2, 1, 0, 0, 1, 0, 1, 0, 0, 0),
    70: (48, 79, 118, 41, 33, 17, 36, 9, 9, 2, 3, 2, 1, 3, 4, 8, 18, 7, 8, 20, 4, 13, 2, 1, 0, 0, 1, 0, 1, 0, 0, 0),
    80: (128, 127, 118, 35, 26, 8, 13, 3, 2, 1, 0, 0, 0, 2, 1, 8, 7, 8, 5, 11, 2, 6, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0),
    90: (262, 153, 80, 19, 13, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 1, 2, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0),
}
# fmt: on


def fitprune(
    num_layers: int = 32,
    ratio: float | None = None,
    reduction: int | None = None,
    layers: Sequence[int] | None = None,
) -> Schedule:
    """FitPrune's published tables, by name or interpolated to a ratio.

    Its code cuts inside a layer, which equals the boundary before the next. Other depths use the tables in proportion.

    Args:
        num_layers: Layers of the decoder.
        ratio: 1 - the share of FLOPs removed: a table, or shares of 576 interpolated linearly between two.
        reduction: A table by its name instead, 10 to 90: counts, whatever the prompt's size. Takes precedence over
            `ratio`.
        layers: Other boundaries.

    Raises:
        ValueError: If neither is given or there is no such table, or the boundaries do not fit the layers.
    """
    if reduction is None and ratio is None:
        raise ValueError("give fitprune a ratio, or the name of a published table as reduction")
    if reduction is not None and reduction not in FITPRUNE:
        raise ValueError(
            f"reduction is one of the published tables, {', '.join(map(str, FITPRUNE))}, not {reduction!r}"
        )
    tables = {0: [576.0] * 32, **{name: left_of(gone) for name, gone in FITPRUNE.items()}, 100: [0.0] * 32}
    if reduction is not None:
        left = tables[reduction]
    else:
        check_ratio(ratio)
        wanted = 100 * (1 - (ratio or 0.0))
        low = max(name for name in tables if name <= wanted + 1e-9)
        high = min(name for name in tables if name >= wanted - 1e-9)
        share = (wanted - low) / (high - low) if high > low else 0.0
        left = [a + share * (b - a) for a, b in zip(tables[low], tables[high])]
    stages, before = [], 576.0
    for layer in range(1, num_layers) if layers is None else layers:
        now = left[min(31, max(1, round(layer * 32 / num_layers)) - 1)]
        if now < before or layers is not None:
            stages.append(Stage(layer, now / 576) if reduction is None else Stage(layer, tokens=int(now)))
        before = now
    return Schedule(tuple(stages)).check(num_layers)


def left_of(gone: Sequence[int]) -> list[float]:
    """How many of 576 are left after each layer."""
    return [float(576 - sum(gone[: layer + 1])) for layer in range(len(gone))]
