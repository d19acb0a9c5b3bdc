"""What a command leaves running: its processes are told by a mark in their environment."""

from __future__ import annotations

import time
from pathlib import Path


def marked(mark: str) -> list[str]:
    """The processes that have a mark in their environment: what a command started, and what that started."""
    found = []
    for place in Path("/proc").iterdir():
        try:
            if place.name.isdecimal() and mark.encode() in (place / "environ").read_bytes():
                found.append(f"{place.name} {(place / 'cmdline').read_bytes()[:80]!r}")
        except OSError:  # it has ended meanwhile
            continue
    return found


def left_after(seconds: float, mark: str, *, agents: bool = True) -> list[str]:
    """Those that are still there when so many seconds have passed; waits no longer than there are any.

    After SIGKILL of a command nobody tells Ray's two agents, which look for their server for a minute: `agents=False`
    leaves them out.
    """
    end = time.monotonic() + seconds
    while (left := [line for line in marked(mark) if agents or "Agent" not in line]) and time.monotonic() < end:
        time.sleep(0.2)
    return left
