"""The benchmarks' records: one JSON file each, named by kind and time, which `python -m analysis bench` reads."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pdrop.environment import environment
from pdrop.store import write_atomically


class Session:
    """A running benchmark: when it started, under what load. Made before anything is measured."""

    def __init__(self) -> None:
        self.started, self.load = time.time(), os.getloadavg()

    def publish(self, folder: Path, kind: str, found: Mapping[str, Any], device: str = "cpu") -> Path:
        """Write the results with their circumstances; returns the file's path.

        Args:
            folder: Such as results/bench.
            kind: Beginning of the file's name; "": the benchmark of prefill and decoding.
            found: The results.
            device: The device that was measured.
        """
        loads: Sequence[Sequence[float]] = (self.load, os.getloadavg())
        record = {
            **found,
            "threads": torch.get_num_threads(),
            "load_before_and_after": loads,
            "seconds": time.time() - self.started,
            "environment": environment(device),
        }
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(self.started))
        path = folder / f"{kind}-{stamp}.json" if kind else folder / f"{stamp}.json"
        write_atomically(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
        return path

    def said(self, path: Path) -> str:
        """A line about the record that was written."""
        return f"record: {path}   ({time.time() - self.started:.0f} s, load {self.load[0]:.1f} before)"
