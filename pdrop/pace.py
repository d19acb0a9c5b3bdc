"""Progress as plain log lines, one every half a minute, for output that is not a terminal and so has no bar.

Standard library only.
"""

from __future__ import annotations

import logging
import os
import sys
import time

log = logging.getLogger("pdrop")

EVERY = 30.0  # seconds between two lines


def on_a_terminal() -> bool:
    """Whether output goes to a terminal with a width: progress bars are drawn there only, and need one."""
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0


def duration(seconds: float) -> str:
    """Seconds as a person would say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def speed(rate: float) -> str:
    """A number per second as a person would say it."""
    if rate >= 1:
        return f"{rate:.0f} per s" if rate >= 10 else f"{rate:.1f} per s"
    return f"{1 / rate:.1f} s each"


class Pace:
    """Logs progress and its rate every `EVERY` seconds.

    Args:
        what: What it is.
        unit: What it is counted in.
        done: How much of it was done before.
    """

    def __init__(self, what: str, unit: str, done: int = 0) -> None:
        self.what, self.unit = what, unit
        self._first, self._started = done, time.monotonic()
        self._said = self._started

    def turn_to(self, what: str) -> None:
        """Go on with another thing, counted anew; the next line comes when the last one is `EVERY` seconds old."""
        self.what, self._first, self._started = what, 0, time.monotonic()

    def at(self, done: int, total: int | None = None) -> None:
        """Log a line if the last one is `EVERY` seconds old.

        Args:
            done: How much is done by now.
            total: Out of how many; None: unknown.
        """
        now = time.monotonic()
        if now - self._said < EVERY:
            return
        self._said = now
        rate = (done - self._first) / (now - self._started)
        text = f"{self.what}: {done}{'' if total is None else f' of {total}'} {self.unit}"
        if rate > 0:
            text += f", {speed(rate)}"
            text += "" if total is None else f", about {duration((total - done) / rate)} left"
        log.info("%s", text)
