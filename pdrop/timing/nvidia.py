"""What a GPU does besides what torch sees: its clocks, whether it is slowed down, who else holds memory on it.

Read by nvidia-smi, which comes with the driver; where there is none, or a value is not told (in a container, of a part
of a card), nothing is said of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CLOCKS = ("clocks.sm", "power.draw", "temperature.gpu")
REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # its name of today, and of older drivers
# of the bits of these reasons: those of a card that is in trouble
SLOWED = {0x8: "hardware", 0x20: "heat", 0x40: "heat (hardware)", 0x80: "power supply"}
POWER_CAP = 0x4  # at its power limit, as big cards under load are
EXCLUSIVE = "Exclusive_Process"


def uuid_of(device: torch.device) -> str:
    """The card's name for nvidia-smi, whichever are visible to torch."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def command(device: torch.device, what: str) -> list[str]:
    """What is typed for one card: the answer is CSV without a head and without units."""
    return ["nvidia-smi", f"--id={uuid_of(device)}", f"--query-{what}", "--format=csv,noheader,nounits"]


def ask(device: torch.device, what: str) -> str | None:
    """What nvidia-smi says, as CSV; None where it cannot be asked."""
    if shutil.which("nvidia-smi") is None:
        return None
    found = subprocess.run(command(device, what), capture_output=True, text=True, timeout=60, check=False)
    return found.stdout if found.returncode == 0 else None


def clocks_at_work(work: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Clocks while `work` is done again and again: those of an idle card say nothing.

    Returns:
        As `read_clocks`.
    """
    for reasons in REASONS if shutil.which("nvidia-smi") is not None else ():
        line = command(device, f"gpu={','.join([*CLOCKS, reasons])}")
        work()  # however soon the answer comes, the card was not idle
        with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as asked:
            while asked.poll() is None:
                work()
                torch.cuda.synchronize(device)
            assert asked.stdout is not None
            if asked.returncode == 0:
                return read_clocks(asked.stdout.read())
    return read_clocks(None)


def read_clocks(text: str | None) -> dict[str, Any]:
    """`clock_mhz`, `power_w`, `temperature_c`, each None where it is not told, and `slowed`: by what, in words."""
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
    """A number of nvidia-smi's; None for "[N/A]" and the like."""
    try:
        return float(text)
    except ValueError:
        return None


def others_gib(device: torch.device) -> float | None:
    """Memory that other processes hold on the card, without those that started this one; None where it is not told."""
    return read_others(ask(device, "compute-apps=pid,used_memory"), {os.getpid(), *ancestors(os.getpid())})


def read_others(text: str | None, own: set[int]) -> float | None:
    """GiB of all processes that are not `own`; None unless one of `own` is listed, for then the ids are another's."""
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
    """Process ids above one, as Linux tells them."""
    found: set[int] = set()
    while (stat := Path(f"/proc/{pid}/stat")).exists():
        pid = int(stat.read_text().rpartition(")")[2].split()[1])
        if pid in found or pid <= 1:
            break
        found.add(pid)
    return found


def exclusive(device: torch.device) -> bool:
    """Whether the card takes one process at a time."""
    return (ask(device, "gpu=compute_mode") or "").strip() == EXCLUSIVE
