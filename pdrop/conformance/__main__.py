"""python -m pdrop.conformance METHOD [dial=value ...]: all checks of a method, one per line. Exit code 1 if one fails.

METHOD is a file of conf/method/, with run.py's dials (ratio=0.25, positions=original, twin=true, schedule.budget=64),
or the dotted name of a class, which is made without arguments and gets a schedule of a kind that it accepts.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
import yaml

from pdrop.cli.compose import choices, choose
from pdrop.command_help import CommandHelp
from pdrop.conformance.families import FAMILIES, LAYERS
from pdrop.conformance.suite import CHECKS, Result, Subject, run
from pdrop.methods.base import Method
from pdrop.schedule import Schedule, Stage


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, make the checks, print the results; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pdrop.conformance", description=__doc__, formatter_class=CommandHelp
    )
    parser.add_argument("method", metavar="METHOD", help=f"{', '.join(choices('method'))}, or package.module.Class")
    parser.add_argument("dials", nargs="*", metavar="dial=value")
    parser.add_argument(
        "--family",
        action="append",
        choices=list(FAMILIES),
        metavar="NAME",
        help=f"only this kind of model: {', '.join(FAMILIES)}",
    )
    options = parser.parse_args(arguments)
    try:
        subject = subject_of(options.method, options.dials)
        subject.method.check(subject.schedule)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    torch.set_num_threads(1)
    started, failed = time.perf_counter(), False
    say = sys.stdout.write
    say(f"{subject.name}: {subject.method!r}, schedule {subject.schedule} of {LAYERS} layers\n")
    for check in CHECKS:
        found = list(run(subject, options.family, checks=[check]))
        failed |= any(result.outcome == "failed" for result in found)
        if found:
            say(line(check.name, found))
            sys.stdout.flush()
    say(f"{'FAILED' if failed else 'conforms'} ({time.perf_counter() - started:.0f} s)\n")
    return int(failed)


def line(name: str, found: Sequence[Result]) -> str:
    """One check in words: on how many models, and what failed on which."""
    by_outcome: dict[str, list[Result]] = defaultdict(list)
    for result in found:
        by_outcome[result.outcome].append(result)
    seconds = sum(result.seconds for result in found)
    if by_outcome["failed"]:
        text = f"  FAILED  {name}: {len(by_outcome['failed'])} of {len(found)} models\n"
        told: dict[str, list[str]] = defaultdict(list)
        for result in by_outcome["failed"]:
            told[result.message].append(f"{result.family}/{result.backend}")
        return text + "".join(f"          {', '.join(where)}: {what}\n" for what, where in told.items())
    if by_outcome["not applicable"]:
        (first, *_) = by_outcome["not applicable"]
        return f"  -       {name}: not applicable, {first.message}\n"
    return f"  ok      {name} ({len(found)} model{'s' if len(found) > 1 else ''}, {seconds:.1f} s)\n"


def subject_of(name: str, dials: Sequence[str] = ()) -> Subject:
    """The method that a name and dials describe.

    Raises:
        ValueError: If there is no such method, or it drops nothing.
    """
    if name in choices("method"):
        pairs = [dial.partition("=") for dial in dials]
        if odd := [dial for dial, (_, sign, _) in zip(dials, pairs) if not sign]:
            raise ValueError(f"{odd[0]!r} is not a dial: write dial=value")
        method, schedule = choose(name, {key: read(key, value) for key, _, value in pairs})
        if method is None:
            raise ValueError(f"{name} is not a method that drops: there is nothing to check")
        return Subject(" ".join([name, *dials]), method, functools.cache(schedule))
    module, dot, kind = name.rpartition(".")
    if not dot or dials:
        raise ValueError(
            f"unknown method {name!r}: choose {', '.join(choices('method'))}, or give a class by its dotted name"
        )
    try:
        method = getattr(import_module(module), kind)()
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"{name} cannot be made without arguments: {error}") from error
    if not isinstance(method, Method):
        raise ValueError(f"{name} is not a pdrop.methods.base.Method")
    return Subject(name, method, lambda layers: usual(method))


def read(dial: str, value: str) -> Any:
    """The value of a dial.

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"{dial}={value} cannot be read: {getattr(error, 'problem', error)}") from error


def usual(method: Method) -> Schedule:
    """Two boundaries, a half and a quarter; for methods that take one, or adaptive ones, such a schedule."""
    if method.adaptive:
        return Schedule((Stage(2, adaptive=True), Stage(4, adaptive=True)))
    return Schedule((Stage(2, 0.5),) if method.one_boundary else (Stage(2, 0.5), Stage(4, 0.25)))


if __name__ == "__main__":
    sys.exit(main())
