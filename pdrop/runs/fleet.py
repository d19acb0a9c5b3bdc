"""What the workers of a run do at the moment: how fast each answers, for the terminal, the log and other processes.

The note of who holds a run's folder (pdrop/store.py) says it, a few seconds old at most: `python -m analysis status`
shows it from anywhere that sees the store.
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
SHOWN = 0.5  # s between two looks of a terminal


@dataclass(frozen=True)
class SweepPosition:
    """Where a sweep is.

    Attributes:
        number, whole: Of the run, from 1 on, and of how many.
        seconds: About how long this run and the rest take; None: nobody knows.
        since: When that was said, by the monotonic clock.
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
    """Counts what each worker of a team answers of one task's questions, and says it now and then.

    Args:
        team: The workers.
        task: What is asked.
        done: Questions that are answered already.
        total: How many there are.
        folder: The run's; None: there is none to note it in.
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
        """A worker has answered so many questions more."""
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
        """Questions per second that a worker has answered since it was there, or this began."""
        seconds = time.monotonic() - max(self.started, member.arrived)
        return self.counts.get(member.number, 0) / max(seconds, 1e-3)

    def line(self) -> str:
        """The whole fleet, and where the sweep is."""
        rates = sorted(self.rate(member) for member in self.team.members) or [0.0]
        text = f"{counted(len(self.team.members), 'worker')}, {speed(sum(rates))}" if sum(rates) else "workers start"
        if len(rates) > 1 and rates[0]:
            text += f" ({rates[0]:.2g} to {rates[-1]:.2g} each)"
        place = SWEEP.get()
        return text if place is None else f"{text}; {place}"

    def show(self) -> None:
        """On a terminal: below the bar of the task."""
        from tqdm import tqdm

        if self.bar is None:
            self.bar = tqdm(bar_format="{desc}", leave=False, dynamic_ncols=True)
        self.bar.set_description_str(self.line())

    def note(self) -> None:
        """For other processes: see `pdrop.store.holder`."""
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
        """A worker for the note."""
        count = self.counts.get(member.number, 0)
        return {"number": member.number, **(member.about or {}), "answered": count, "rate": round(self.rate(member), 3)}


def counted(number: int, what: str) -> str:
    """A number of things."""
    return f"{number} {what}{'s' * (number != 1)}"
