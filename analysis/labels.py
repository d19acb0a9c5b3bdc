"""Labels next to their curves, each at the nearest free place, and vertical ranges that fit the values.

Only labels are moved: each point stays where it was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import patheffects

from .statistics import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = 6.5  # points
NEAR = 11.0  # points: at this distance or more a thin line leads to the label
DISTANCES, ANGLES = (4.0, 7.0, 11.0, 16.0, 23.0, 32.0, 43.0, 56.0), 16
MARK, STEP = 3.5, 4.0  # points: half a marker, and the spacing at which lines are sampled
HIDDEN, OUTSIDE = 4.0, 60.0  # cost of a square point that is covered, and of one that is cut off
ROOM = 0.07  # of the range, above and below
NOTE = 2.2  # times ROOM if a reference is named at the edge
BEYOND = 0.3  # of the range: a reference farther away is named at the edge, not drawn


@dataclass(frozen=True)
class Named:
    """A curve to name: its label and colour, its points [(x, y)], and the bars at them [(low, high)].

    Lines join the points only if `joined` is true.
    """

    label: str
    colour: str
    points: Sequence[tuple[float, float]]
    bars: Sequence[tuple[float, float]] = ()
    joined: bool = True


def name_curves(axes: Axes, curves: Sequence[Named], others: Sequence[Named] = ()) -> None:
    """Put each curve's label near one of its points, where it hides least; to be called when the axis ranges are final.

    Args:
        axes: The panel.
        curves: The curves to name.
        others: Other things that must not be hidden, such as horizontal lines.
    """
    figure = axes.figure
    figure.draw_without_rendering()  # type: ignore[union-attr]  # the layout is made here
    unit = figure.dpi / 72
    inside = axes.get_window_extent()
    frame = np.array([inside.x0, inside.y0, inside.x1, inside.y1]) / unit
    taken = np.concatenate([occupied(axes, one) / unit for one in (*curves, *others)] or [np.empty((0, 4))])
    for one in sorted(curves, key=lambda one: (len(one.points), one.label)):
        text = axes.text(0, 0, one.label, fontsize=SIZE)
        box = text.get_window_extent()
        width, height = box.width / unit, box.height / unit
        text.remove()
        best: tuple[float, FloatArray, tuple[float, float], float] | None = None
        for point in one.points:
            at = axes.transData.transform(point) / unit
            for distance in DISTANCES:
                for angle in np.arange(ANGLES) * 2 * math.pi / ANGLES:
                    middle = at + np.array(
                        [(distance + width / 2) * math.cos(angle), (distance + height / 2) * math.sin(angle)]
                    )
                    place = np.array([*(middle - (width / 2, height / 2)), *(middle + (width / 2, height / 2))])
                    cost = HIDDEN * covered(place, taken) + OUTSIDE * sticking_out(place, frame) + distance
                    if best is None or cost < best[0] - 1e-9:
                        best = cost, place, point, distance
        assert best is not None
        _, place, point, distance = best
        at = axes.transData.transform(point) / unit
        note = axes.annotate(
            one.label,
            point,
            xytext=tuple((place[:2] + place[2:]) / 2 - at),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=SIZE,
            color=one.colour,
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": one.colour, "shrinkA": 0, "shrinkB": 2.5}
            if distance >= NEAR
            else None,
            zorder=5,
            parse_math=False,
        )
        note.set_path_effects([patheffects.withStroke(linewidth=1.6, foreground="white")])
        note.set_in_layout(False)
        taken = np.concatenate([taken, place[None]])


def occupied(axes: Axes, one: Named) -> FloatArray:
    """Boxes [n, 4] (left, bottom, right, top), in pixels, that cover a curve's markers, bars and lines."""
    unit = axes.figure.dpi / 72
    places = axes.transData.transform(np.array(one.points, dtype=np.float64).reshape(-1, 2))
    boxes = [[x - MARK * unit, y - MARK * unit, x + MARK * unit, y + MARK * unit] for x, y in places]
    for (x, _), (low, high) in zip(one.points, one.bars):
        (left, bottom), (_, top) = axes.transData.transform([(x, low), (x, high)])
        boxes.append([left - unit, bottom, left + unit, top])
    for (x, y), (u, v) in zip(places, places[1:]) if one.joined else ():
        steps = max(1, round(math.hypot(u - x, v - y) / STEP / unit))
        for share in (np.arange(steps) + 0.5) / steps:
            middle = np.array([x + share * (u - x), y + share * (v - y)])
            boxes.append([*(middle - STEP / 2 * unit), *(middle + STEP / 2 * unit)])
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)


def covered(place: FloatArray, taken: FloatArray) -> float:
    """Area that a box shares with others, in square points."""
    across = np.minimum(place[2], taken[:, 2]) - np.maximum(place[0], taken[:, 0])
    down = np.minimum(place[3], taken[:, 3]) - np.maximum(place[1], taken[:, 1])
    return float((np.clip(across, 0, None) * np.clip(down, 0, None)).sum())


def sticking_out(place: FloatArray, frame: FloatArray) -> float:
    """Area of a box outside the frame, in square points."""
    width, height = place[2:] - place[:2]
    across = max(0.0, min(place[2], frame[2]) - max(place[0], frame[0]))
    down = max(0.0, min(place[3], frame[3]) - max(place[1], frame[1]))
    return float(width * height - across * down)


def fit(axes: Axes, values: Sequence[float], references: Sequence[tuple[str, float]] = ()) -> None:
    """Set the vertical range to the measured values; a reference far outside it is named at the edge.

    Args:
        axes: The panel; the references' horizontal lines are already drawn.
        values: Scores and the ends of their bars.
        references: Names and heights of horizontal lines that need not be in the range.
    """
    if not values:
        return
    low, high = min(values), max(values)
    reach = BEYOND * max(high - low, 1e-9)
    near = [height for _, height in references if low - reach <= height <= high + reach]
    low, high = min([low, *near]), max([high, *near])
    room = ROOM * max(high - low, 1e-3 * max(abs(high), 1.0))
    far = [height for _, height in references if height not in near]
    below, above = (NOTE * room if any(test(height) for height in far) else room for test in (low.__gt__, high.__lt__))
    axes.set_ylim(low - below, high + above)
    for name, height in references:
        if height not in near:
            over = height > high
            axes.annotate(
                f"{'↑' if over else '↓'} {name} {height:.0f}",
                (0.01, 0.99 if over else 0.01),
                xycoords="axes fraction",
                va="top" if over else "bottom",
                fontsize=SIZE,
                color="0.35",
            )
