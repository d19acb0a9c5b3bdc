"""Where a run is made: code, packages, machine. Standard library only; what only torch knows, the caller adds."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

VERSIONS_THAT_MATTER = ("torch", "transformers", "lmms-eval")  # those that can change a number


def versions(packages: Sequence[str] = VERSIONS_THAT_MATTER) -> dict[str, str]:
    """Installed versions; a package that is not there is left out."""
    found = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def environment() -> dict[str, Any]:
    """Code, packages and machine of this process, for a record."""
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
        "processor": processor(),
        "cores": os.cpu_count(),
        **git_state(),
    }


def processor() -> str:
    """The processor's name as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def git_state() -> dict[str, Any]:
    """Commit and dirty flag of the checkout this package is run from; both None for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return {"git_commit": None, "git_dirty": None}

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # what a run writes is not code: a sweep must not call itself dirty because of its own records
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results", ":!experiments")
        return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": bool(dirty)}
    except (OSError, subprocess.CalledProcessError) as error:
        log.warning("no git state recorded: %s", error)
        return {"git_commit": None, "git_dirty": None}
