"""What a run is made with: code, packages, machine. Standard library only; torch is read if a run has loaded it."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from pdrop.identity import code_digest

log = logging.getLogger(__name__)

VERSIONS_THAT_MATTER = ("torch", "transformers", "tokenizers", "pillow", "lmms-eval")  # can change a number


def versions(packages: Sequence[str] = VERSIONS_THAT_MATTER) -> dict[str, str]:
    """Installed versions; a package that is not installed is left out."""
    found = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def environment(device: str = "cpu") -> dict[str, Any]:
    """Code, packages and machine of this process, for a record of what it does on `device`."""
    packages = (
        "pdrop",
        "torch",
        "torchvision",
        "transformers",
        "lmms-eval",
        "datasets",
        "numpy",
        "pillow",
        "hydra-core",
    )
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "packages": versions(packages),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        **git_state(),
        "sources": code_digest(),
        **accelerator(device),
    }


def accelerator(device: str) -> dict[str, Any]:
    """The processor's name, the device's name (on the CPU, the processor's), and torch's threads. A cost in closed form
    loads no torch: there the last two are None."""
    torch, cpu = sys.modules.get("torch"), processor()
    if torch is None:
        return {"processor": cpu, "device_name": None, "threads": None}
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu
    return {"processor": cpu, "device_name": name, "threads": torch.get_num_threads()}


def processor() -> str:
    """The processor's name as the system reports it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@functools.cache
def git_state() -> dict[str, Any]:
    """Commit and dirty flag of the checkout this package is run from; both None for an installed package.

    Read once per process: a commit made while a sweep runs is not what the sweep runs. New files count as dirt where
    code and configuration live; what a run writes does not.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return {"git_commit": None, "git_dirty": None}

    def git(*args: str) -> str:
        command = ["git", "-C", str(root), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
        new = git("status", "--porcelain", "--untracked-files=all", "--", "run.py", "pdrop", "conf", "experiments")
        return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": bool(changed or new)}
    except (OSError, subprocess.CalledProcessError) as error:
        log.warning("no git state recorded: %s", error)
        return {"git_commit": None, "git_dirty": None}
