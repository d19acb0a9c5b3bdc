"""A card for each job that a launcher starts beside others: joblib's jobs would all take the first one.

A job takes the first card that no other job of this machine and user has, by a lock that the system frees however the
process ends, and sees no other card from then on. Where one card is visible (SLURM gives each job its own) there is
nothing to take. Standard library only: a process that has asked CUDA once does not look again.
"""

from __future__ import annotations

import fcntl
import functools
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

VISIBLE = "CUDA_VISIBLE_DEVICES"
DRIVER = Path("/proc/driver/nvidia/gpus")  # one folder per card


def visible(environment: Mapping[str, str] = os.environ, driver: Path = DRIVER) -> list[str]:
    """The cards that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if (given := environment.get(VISIBLE)) is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    return [str(number) for number, _ in enumerate(driver.iterdir())] if driver.is_dir() else []


@functools.cache
def claim() -> str | None:
    """Take a card for this process, once; None where there is nothing to choose.

    Raises:
        ValueError: If other jobs have all of them.
    """
    cards = visible()
    if len(cards) < 2:
        return None
    os.environ[VISIBLE] = taken = first_free(cards)
    return taken


def first_free(cards: Sequence[str], folder: Path | None = None) -> str:
    """Lock the first card that nobody holds, until this process ends.

    Args:
        cards: Their names.
        folder: Where the locks lie; None: the system's folder for temporary files.

    Raises:
        ValueError: If all are held.
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
        return card  # the descriptor stays open: the lock is this process's
    raise ValueError(
        f"all {len(cards)} cards of this machine are taken by other jobs: start fewer at once, "
        f"hydra.launcher.n_jobs={len(cards)}, or use workers={len(cards)} without a launcher"
    )
