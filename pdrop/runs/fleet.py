"""Progress of a run's workers: how fast each answers, for the terminal, the log and other processes.

It is kept in the note of a run's folder (pdrop/store.py), at most a few seconds old: `python -m analysis status` shows
it on any machine that sees the store.
"""

from __future__ import annotations

import logging
import time
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pdrop.pace import EVERY, duration, on_a_terminal, speed
from pdrop.store import tell

if TYPE_CHECKING:
    from pdrop.runs.workers import Member, Team

log = logging.getLogger("pdrop")

NOTED = 5.0  # s between two notes
SHOWN = 0.5  # s between two updates of a terminal


@dataclass(frozen=True)
class SweepPosition:
    """The position of a run in its sweep.

    Attributes:
        number, whole: The run's number, from 1 on, and the number of runs.
        seconds: About how long this run and the rest take; None: unknown.
        since: When that was estimated, by the monotonic clock.
    """

    number: int
    whole: int
    seconds: float | None
    since: float

    def __str__(self) -> str:
        text = f"run {self.number} of {self.whole}"
        if self.seconds is None:
            return text
        return f"{text}, about {duration(max(0.0, self.seconds - (time.monotonic() - self.since)))} left"


SWEEP: ContextVar[SweepPosition | None] = ContextVar("sweep", default=None)


class Fleet:
    """Counts how many of a task's questions each worker of a team has answered, and reports it regularly.

    Args:
        team: The workers.
        task: The task.
        done: Questions already answered.
        total: Number of questions.
        folder: The run's folder, for the note; None: no note.
    """

    def __init__(self, team: Team, task: str, done: int, total: int, folder: Path | None) -> None:
        self.team, self.task, self.done, self.total, self.folder = team, task, done, total, folder
        self.counts: dict[int, int] = {}  # by the worker's number
        self.started = self.noted = self.said = time.monotonic()
        self.bar: Any = None

    def __enter__(self) -> Fleet:
        self.note()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()
        self.note()

    def answered(self, member: Member, count: int) -> None:
        """Count further answers of a worker."""
        self.counts[member.number] = self.counts.get(member.number, 0) + count
        self.done += count
        now = time.monotonic()
        if now - self.noted >= NOTED:
            self.note()
        if on_a_terminal() and now - self.said >= SHOWN:
            self.said = now
            self.show()
        elif not on_a_terminal() and now - self.said >= EVERY:
            self.said = now
            log.info("workers       %s", self.line())

    def rate(self, member: Member) -> float:
        """A worker's questions per second, since it was ready or this task began."""
        seconds = time.monotonic() - max(self.started, member.arrived)
        return self.counts.get(member.number, 0) / max(seconds, 1e-3)

    def line(self) -> str:
        """The rates of all workers, and the position in the sweep, as text."""
        rates = sorted(self.rate(member) for member in self.team.members) or [0.0]
        text = f"{counted(len(self.team.members), 'worker')}, {speed(sum(rates))}" if sum(rates) else "workers start"
        if len(rates) > 1 and rates[0]:
            text += f" ({rates[0]:.2g} to {rates[-1]:.2g} each)"
        place = SWEEP.get()
        return text if place is None else f"{text}; {place}"

    def show(self) -> None:
        """Show the line below the task's bar on a terminal."""
        from tqdm import tqdm

        if self.bar is None:
            self.bar = tqdm(bar_format="{desc}", leave=False, dynamic_ncols=True)
        self.bar.set_description_str(self.line())

    def note(self) -> None:
        """Write the note for other processes: see `pdrop.store.holder`."""
        self.noted = time.monotonic()
        if self.folder is not None:
            tell(
                self.folder,
                task={"name": self.task, "done": self.done, "total": self.total},
                workers=list(map(self.about, self.team.members)),
                starting=len(self.team.starting),
                dashboard=self.team.dashboard,
            )

    def about(self, member: Member) -> dict[str, Any]:
        """A worker's entry in the note."""
        count = self.counts.get(member.number, 0)
        return {"number": member.number, **(member.about or {}), "answered": count, "rate": round(self.rate(member), 3)}


def counted(number: int, what: str) -> str:
    """A count with its noun in singular or plural."""
    return f"{number} {what}{'s' * (number != 1)}"
