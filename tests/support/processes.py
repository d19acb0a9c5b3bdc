"""Processes of their own for tests, forked from a server that has imported torch and the like.

A spawned process imports everything anew, which takes most of a test's CPU time; one forked from the test's process
would hold whatever that holds.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.multiprocessing.spawn import start_processes

IMPORTED = ("torch", "transformers", "pdrop.training.job", "pdrop.evaluation.lmms")


def server() -> Any:
    """The context whose processes are forked from the server; it runs from here on."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}):
        forkserver.ensure_running()
    return context


def all_done(function: Callable[..., None], arguments: tuple[Any, ...], count: int) -> None:
    """Call `function(rank, *arguments)` in `count` processes and wait; an exception in one of them is raised here."""
    server()
    start_processes(function, arguments, count, start_method="forkserver")


def begun(main: Callable[..., None], folder: Path, words: list[str], *arguments: Any) -> BaseProcess:
    """A process that calls `main(*arguments)` in a folder, sys.argv as given; what it says is in said.txt there."""
    process: BaseProcess = server().Process(target=_called, args=(main, folder, words, arguments))
    process.start()
    return process


def _called(main: Callable[..., None], folder: Path, words: list[str], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    sys.argv = words
    with Path("said.txt").open("w", buffering=1) as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    main(*arguments)
