"""Where a run is made: code, packages, machine. Standard library only; what only torch knows, the caller adds."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
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

VERSIONS_THAT_MATTER = ("torch", "transformers", "tokenizers", "pillow", "lmms-eval")  # can change a number


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
        "sources": code_digest(),
    }


def processor() -> str:
    """The processor's name as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@functools.cache
def git_state() -> dict[str, Any]:
    """Commit and dirty flag of the checkout this package is run from; both None for an installed package.

    Read once a process: a commit made while a sweep runs is not what the sweep runs. New files count as dirt where
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


@functools.cache
def code_digest(*others: Path) -> str:
    """12 hex digits over the sources that make numbers: this package without corpus and checks, and `others`.

    Comments, docstrings and layout do not count.
    """
    package = Path(__file__).resolve().parent
    idle = {"embedded", "conformance"}
    own = [path for path in package.rglob("*.py") if not idle & set(path.relative_to(package).parts)]
    digest = hashlib.sha256()
    for path in [*sorted(own), *sorted(set(others) - set(own))]:
        tree = ast.parse(path.read_text(encoding="utf8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
                node.body = node.body[1:]
        digest.update(f"{path.name}\n{ast.dump(tree)}\n".encode())
    return digest.hexdigest()[:12]
