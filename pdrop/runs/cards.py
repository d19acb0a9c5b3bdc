"""Gives each of a launcher's concurrent jobs its own card: joblib's jobs would all take the first one.

A job takes the first card that no other job of this machine and user holds, by a lock that the system releases however
the process ends, and sees no other card from then on. If only one card is visible (SLURM gives each job its own)
nothing is taken. submitit's local jobs see no card by themselves: the command tells them which it sees. Standard
library only: once a process has initialised CUDA, the choice has no effect.
"""

from __future__ import annotations

import fcntl
import functools
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

log = logging.getLogger("pdrop")

VISIBLE = "CUDA_VISIBLE_DEVICES"
OFFERED = "PDROP_CARDS"  # as VISIBLE: what the command that starts the jobs sees
DRIVER = Path("/proc/driver/nvidia/gpus")  # one folder per card


def visible(environment: Mapping[str, str] = os.environ, driver: Path = DRIVER) -> list[str]:
    """The cards that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if (given := environment.get(VISIBLE)) is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    return [str(number) for number, _ in enumerate(driver.iterdir())] if driver.is_dir() else []


def offer() -> None:
    """Tell the jobs that a launcher is going to start which cards this process sees."""
    os.environ[OFFERED] = ",".join(visible())


@functools.cache
def claim() -> str | None:
    """Take a card for this process, once; None if there is no choice.

    Raises:
        ValueError: If other jobs hold all cards.
    """
    cards = visible()
    if not cards and os.environ.get("SUBMITIT_EXECUTOR") == "local":  # it hides all cards from its jobs
        cards = visible({VISIBLE: os.environ.get(OFFERED, "")})
        os.environ[VISIBLE] = ",".join(cards)
    if len(cards) < 2:
        return None
    os.environ[VISIBLE] = taken = first_free(cards)
    log.info("card          %s (of %s)", taken, ", ".join(cards))
    return taken


def first_free(cards: Sequence[str], folder: Path | None = None) -> str:
    """Lock the first free card until this process ends.

    Args:
        cards: Their names.
        folder: Folder of the locks; None: the system's folder for temporary files.

    Raises:
        ValueError: If all cards are held.
    """
    folder = folder or Path(tempfile.gettempdir()) / f"pdrop-cards-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    for card in cards:
        lock = os.open(folder / card.replace("/", "_"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        return card  # the descriptor stays open, and with it the lock is held
    raise ValueError(
        f"all {len(cards)} cards of this machine are taken by other jobs: start fewer at once, "
        f"hydra.launcher.n_jobs={len(cards)} (joblib) or hydra.sweeper.max_batch_size={len(cards)} (submitit_local), "
        f"or use workers={len(cards)} without a launcher"
    )
