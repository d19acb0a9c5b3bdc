"""The effect of training with dropping as a figure: the scores of each way of training, and two differences.

    trainings    left: scores, right: differences to the models trained with nothing dropped; page width

Part of `python -m analysis trainings`, from the numbers of its second table (trained.py); a store with several
groups of comparable trainings gets one figure per group: trainings, trainings-2 and so on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt

from ..drawing import PAGE, SETTINGS
from ..style import method_name, schedule_text
from . import trained, trainings
from .trained import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLAIN = "trained and scored whole, all seeds"
WHOLE, DROPPED, BEFORE, START = (
    "#000000",
    "#0072B2",
    "#D55E00",
    "#7F7F7F",
)  # Okabe and Ito (2008); markers differ as well
OFFSET = 0.14  # of a row: offsets of the markers above and below its middle


def files(results: Path) -> Iterable[tuple[str, Figure]]:
    """Every figure with its file's stem; none if no model was scored as it was trained."""
    shown = []
    for group in trainings.groups(results):
        found = trained.outcomes(results, {one.folder: one.record for one in group})
        if any(one.gain is not None for one in found):
            shown.append(found)
    for number, found in enumerate(shown, 1):
        yield ("trainings" if number == 1 else f"trainings-{number}"), draw(found)


def draw(found: Sequence[Outcome]) -> Figure:
    """One row per way of training that drops, the one that drops nothing as a line."""
    rows = [one for one in found if one.loss is not None or one.gain is not None]
    with plt.rc_context(SETTINGS):
        figure, (scores, differences) = plt.subplots(
            1, 2, figsize=(PAGE, 0.42 * len(rows) + 1.25), sharey=True, layout="constrained"
        )
        draw_scores(scores, rows, {one.way: one.whole for one in found if one not in rows})
        draw_differences(differences, rows)
        scores.set_yticks(range(len(rows)), [label(one) for one in rows])
        scores.set_ylim(len(rows) - 0.5, -0.5)
        for axes in (scores, differences):
            axes.grid(axis="x", linewidth=0.4, color="0.88")
            axes.tick_params(axis="y", length=0)
        handles, names = scores.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=3, frameon=False, handlelength=1.2)
    return figure


def draw_scores(axes: Axes, rows: Sequence[Outcome], lines: Mapping[trained.Way, float | None]) -> None:
    """Scores with and without dropping; a pale line joins the models that drop the same way."""
    for way, name, dashes in ((trained.START, "not fine-tuned, scored whole", ":"), (trained.WHOLE, PLAIN, "-")):
        if (value := lines.get(way)) is not None:
            axes.axvline(100 * value, color=WHOLE, linewidth=0.9, linestyle=dashes, label=name)
    for place, one in enumerate(rows):
        if one.dropped is not None and one.plain is not None:
            axes.plot([100 * one.plain, 100 * one.dropped], 2 * [place], color="0.75", linewidth=1.6, zorder=1)
    marks = (
        ("trained dropping, scored whole", [one.whole for one in rows], "D", WHOLE, "white"),
        ("trained and scored dropping", [one.dropped for one in rows], "o", DROPPED, DROPPED),
        ("trained whole, scored dropping", [one.plain for one in rows], "s", BEFORE, "white"),
        ("not fine-tuned, scored dropping", [one.start for one in rows], "x", START, START),
    )
    for name, values, marker, colour, face in marks:
        known = [(100 * value, place) for place, value in enumerate(values) if value is not None]
        if known:
            axes.plot(*zip(*known), marker, color=colour, markerfacecolor=face, label=name, zorder=3)
    axes.set_xlabel("average score (%)")


def draw_differences(axes: Axes, rows: Sequence[Outcome]) -> None:
    """Draw what training that way changes with nothing dropped and with dropping, each with its interval."""
    axes.axvline(0, color="0.35", linewidth=0.8)
    marks = (
        ([one.loss for one in rows], "D", WHOLE, "white", -OFFSET),
        ([one.gain for one in rows], "o", DROPPED, DROPPED, OFFSET),
    )
    for values, marker, colour, face, shift in marks:
        known = [(place, value) for place, value in enumerate(values) if value is not None]
        if not known:
            continue
        axes.errorbar(
            [100 * value.value for _, value in known],
            [place + shift for place, _ in known],
            xerr=[
                [100 * (value.value - (value.value if value.low is None else value.low)) for _, value in known],
                [100 * ((value.value if value.high is None else value.high) - value.value) for _, value in known],
            ],
            fmt=marker,
            color=colour,
            markerfacecolor=face,
            elinewidth=0.8,
            capsize=1.8,
        )
    axes.set_xlabel("trained dropping minus trained whole (points)")


def label(one: Outcome) -> str:
    """Method, schedule, and how many seeds the row is over."""
    seeds = f"{one.seeds} seed{'' if one.seeds == 1 else 's'}"
    return f"{method_name(one.way.method)}, {seeds}\n{schedule_text(one.way.schedule)}"
