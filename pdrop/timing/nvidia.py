"""GPU state that torch does not report: clocks, throttling, memory held by other processes.

Read by nvidia-smi, which comes with the driver; without it, or if a value is not reported (in a container, for a part
of a card) or the program hangs (which is logged), the value is None.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

PATIENCE = 60  # seconds in which nvidia-smi must have answered
CLOCKS = ("clocks.sm", "power.draw", "temperature.gpu")
REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # its name of today, and of older drivers
# the bits of these reasons that mean a problem of the card
SLOWED = {0x8: "hardware", 0x20: "heat", 0x40: "heat (hardware)", 0x80: "power supply"}
POWER_CAP = 0x4  # at its power limit, which is normal for large cards under load
EXCLUSIVE = "Exclusive_Process"


def uuid_of(device: torch.device) -> str:
    """The card's identifier for nvidia-smi, independent of the cards visible to torch."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def command(device: torch.device, what: str) -> list[str]:
    """The nvidia-smi command for one card; its output is CSV without header and units."""
    return ["nvidia-smi", f"--id={uuid_of(device)}", f"--query-{what}", "--format=csv,noheader,nounits"]


def ask(device: torch.device, what: str) -> str | None:
    """The output of nvidia-smi, as CSV; None if it cannot be run."""
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        found = subprocess.run(command(device, what), capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        hangs(what)
        return None
    return found.stdout if found.returncode == 0 else None


def hangs(what: str) -> None:
    """Say that nvidia-smi was given up."""
    log.warning("nvidia-smi has not answered in %d s: %s will not be in the record", PATIENCE, what.partition("=")[2])


def clocks_at_work(work: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Clocks while `work` is repeated: those of an idle card mean nothing.

    Returns:
        As `read_clocks`.
    """
    for reasons in REASONS if shutil.which("nvidia-smi") is not None else ():
        line = command(device, f"gpu={','.join([*CLOCKS, reasons])}")
        work()  # so that the card is not idle, however soon nvidia-smi answers
        with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as asked:
            end = time.monotonic() + PATIENCE
            while asked.poll() is None:
                if time.monotonic() > end:
                    asked.kill()
                    hangs(line[2])
                    return read_clocks(None)
                work()
                torch.cuda.synchronize(device)
            assert asked.stdout is not None
            if asked.returncode == 0:
                return read_clocks(asked.stdout.read())
    return read_clocks(None)


def read_clocks(text: str | None) -> dict[str, Any]:
    """`clock_mhz`, `power_w`, `temperature_c`, each None if not reported, and `slowed`: the reason, in words."""
    values = [value.strip() for value in (text or "").strip().split(",")]
    clock, power, temperature, reasons = values if len(values) == len(CLOCKS) + 1 else ["", "", "", ""]
    active = int(reasons, 16) if reasons.startswith("0x") else None
    return {
        "clock_mhz": number(clock),
        "power_w": number(power),
        "temperature_c": number(temperature),
        "at_power_limit": None if active is None else bool(active & POWER_CAP),
        "slowed": None if active is None else [words for bit, words in SLOWED.items() if active & bit],
    }


def number(text: str) -> float | None:
    """A number from nvidia-smi; None for "[N/A]" and similar."""
    try:
        return float(text)
    except ValueError:
        return None


def others_gib(device: torch.device) -> float | None:
    """GiB that other processes hold on the card, except ancestors of this one; None if not reported."""
    return read_others(ask(device, "compute-apps=pid,used_memory"), {os.getpid(), *ancestors(os.getpid())})


def read_others(text: str | None, own: set[int]) -> float | None:
    """GiB of all processes that are not `own`; None if none of `own` is listed, since ids then differ (containers)."""
    held: dict[int, float | None] = {}
    for line in (text or "").splitlines():
        pid, _, mib = line.partition(",")
        if pid.strip().isdigit():
            held[int(pid)] = number(mib)
    others = [mib for pid, mib in held.items() if pid not in own]
    if not own & set(held) or None in others:
        return None
    return round(sum(mib for mib in others if mib is not None) / 1024, 2)


def ancestors(pid: int) -> set[int]:
    """The ids of a process's ancestors, from Linux's /proc; process 1 too, which in a container may be a user's."""
    found: set[int] = set()
    while True:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # no /proc, or an ancestor has ended meanwhile
            return found
        if pid == 0 or pid in found:  # 0: a parent outside of this namespace
            return found
        found.add(pid)


def exclusive(device: torch.device) -> bool:
    """Whether the card takes one process at a time."""
    return (ask(device, "gpu=compute_mode") or "").strip() == EXCLUSIVE
