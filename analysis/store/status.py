"""The state of a store's runs: done, running, failed, stopped, waiting. One unreadable record does not hide the others.

The progress of running sweeps comes first. A run with workers (pdrop/runs/workers.py) has a line for each of them.

A run is running while a process holds its folder (pdrop/store.py): the record of a killed one says "running" for ever,
but it is shown as stopped. Waiting are runs that a sweep has yet to do, or that an experiment asks for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdrop.announcements import alive
from pdrop.commands import typed
from pdrop.names import is_name
from pdrop.pace import duration, speed
from pdrop.record import RunRecord
from pdrop.store import holder, reason, state, stored_answers

from .load import AGES, experiments, without

STATES = ("done", "running", "failed", "stopped", "waiting", "unreadable")


@dataclass(frozen=True)
class Standing:
    """The state of one run.

    Attributes:
        state: One of STATES.
        run: Its id, or its folder if there is no record.
        what: Its method and schedule, or the overrides that ask for it.
        detail: Further lines about it.
    """

    state: str
    run: str
    what: str
    detail: tuple[str, ...] = ()


def page(results: Path) -> str:
    """The store's state in words: counts, then a line or two for each run that is not done.

    Raises:
        ValueError: If there is no such folder.
    """
    if not results.is_dir():
        raise ValueError(f"there is no store {results}: start with {typed('run')}, or name another with --results")
    found = list(standings(results))
    counts = [f"{number} {name}" for name in STATES if (number := sum(one.state == name for one in found))]
    text = [f"{results}: {len(found)} run{'s' * (len(found) != 1)}" + (f": {', '.join(counts)}" if counts else "")]
    text += list(sweeps(results))
    for one in sorted(found, key=lambda one: STATES.index(one.state)):
        if one.state != "done":
            text.append(f"{one.state:10s} {one.run:12s}  {one.what}".rstrip())
            text += [f"{'':10s} {line}" for line in one.detail]
    if any(one.state in ("failed", "stopped") for one in found):
        store = "" if str(results) == "results" else f" results={results}"
        text.append(f"to do again what failed, and go on with what stopped: {typed('run')} retry=failed{store}")
    return "\n".join(text) + "\n"


def standings(results: Path) -> Iterator[Standing]:
    """The state of each run in the store."""
    records: dict[str, RunRecord] = {}
    for path in sorted(results.glob("runs/*/record.json")):
        try:
            records[path.parent.name] = RunRecord.read(path.parent)
        except (ValueError, OSError) as error:
            told = str(error).replace(f"{path} is ", "record.json is ")
            yield Standing("unreadable", path.parent.name, "", (told,))
    done = {without(one.spec, AGES) for one in records.values() if one.status == "done"}
    for name, record in records.items():
        one = of_run(results / "runs" / name, record)
        if one.state in ("failed", "stopped") and without(record.spec, AGES) in done:
            continue  # made again later, with other code or packages
        yield one
    for name, detail in waiting(results).items():
        if not (results / "runs" / name / "record.json").exists():
            yield Standing("waiting", name.rpartition("-")[2], detail[0], detail[1:])


def of_run(folder: Path, record: RunRecord) -> Standing:
    """The state of a run with a record."""
    found, spec = state(folder, record.status, record.error), record.spec
    detail: tuple[str, ...] = ()
    if found == "running":
        note = holder(folder) or {}
        detail = (at_work(folder, record, note), *fleet(note))
    elif found == "failed":
        detail = (reason(record.error),)
    elif found == "stopped":
        detail = (f"killed or interrupted after {answered(stored_answers(folder), record)}",)
    return Standing(found, spec.run_id, f"{spec.model} {spec.method} {spec.schedule or '-'}", detail)


def at_work(folder: Path, record: RunRecord, note: Mapping[str, Any]) -> str:
    """A run in progress in words: since when, where, how many questions, how fast."""
    count = stored_answers(folder)
    since, before = number(note.get("since")), number(note.get("answered"))
    parts = []
    if since is not None:
        parts.append(f"for {duration(max(0.0, time.time() - since))}")
    if isinstance(note.get("host"), str):
        parts.append(f"on {note['host']}")
    text = f"{' '.join(parts)}, " if parts else ""
    text += answered(count, record)
    if since is not None and before is not None and count > before:
        text += f", {speed((count - before) / max(1e-3, time.time() - since))}"
    return text


def answered(count: int, record: RunRecord) -> str:
    """The number of answers in words, and of how many if the run's limit says so."""
    spec = record.spec
    whole = "" if spec.limit is None or not spec.tasks else f" of at most {spec.limit * len(spec.tasks)}"
    return f"{count}{whole} question{'s' * (count != 1 or bool(whole))}"


def fleet(note: Mapping[str, Any]) -> Iterator[str]:
    """The workers of a run in words: all of them together, and each."""
    workers = [one for one in entries(note.get("workers")) if number(one.get("rate")) is not None]
    if not workers:
        return
    rate = sum(one["rate"] for one in workers)
    text = f"{len(workers)} worker{'s' * (len(workers) != 1)}"
    text += f", {speed(rate)}" if rate else ""
    text += f", {starting:g} more start" if (starting := number(note.get("starting"))) else ""
    yield text
    task = next(iter(entries([note.get("task")])), {})
    done, total = number(task.get("done")), number(task.get("total"))
    if done is not None and total is not None:
        left = f", about {duration((total - done) / rate)} left" if rate else ""
        yield f"{task.get('name')}: {done:g} of {total:g} questions{left}"
    if note.get("dashboard"):
        yield f"Ray's dashboard: http://{note['dashboard']}"
    for one in workers:
        device = one.get("device") or "CPU"
        pace = speed(one["rate"]) if one["rate"] else "nothing answered yet"
        yield f"worker {one.get('number')}: {pace}; {device} on {one.get('host')}, process {one.get('pid')}"


def entries(found: object) -> list[dict[str, Any]]:
    """The objects of a value from a file, if it is a list."""
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def sweeps(results: Path) -> Iterator[str]:
    """The progress of each running sweep, in words."""
    for path in sorted((results / "sweeps").glob("*.json")):
        note = sweep(path)
        at, run, whole = (number(note.get(name)) for name in ("at", "run", "whole"))
        if at is None or run is None or whole is None or not alive(path):
            continue
        left = number(note.get("left"))
        text = f"sweep on {note.get('host')}, process {note.get('pid')}: run {run:g} of {whole:g}"
        yield text if left is None else f"{text}, about {duration(max(0.0, left - (time.time() - at)))} left"


def waiting(results: Path) -> dict[str, tuple[str, str]]:
    """Folder of a run -> the overrides that ask for it, and who asks: a sweep that has not ended, or an experiment."""
    found: dict[str, tuple[str, str]] = {}
    for name in experiments(results):
        for marker in (results / "experiments" / name).iterdir():
            if marker.is_file() and is_name(marker.name) and not marker.name.startswith("."):
                found[marker.name.removesuffix(".json")] = ("", f"asked for by experiment {name}")
    for path in sorted((results / "sweeps").glob("*.json")):
        note = sweep(path)
        who = f"the sweep on {note.get('host', '?')}" + ("" if alive(path) else " (stopped: the same command goes on)")
        for folder, words in note["runs"].items():
            found[str(folder)] = (" ".join(map(str, words)), who)
    return found


def sweep(path: Path) -> Mapping[str, Any]:
    """A sweep's note; one without runs if it cannot be read."""
    try:
        note = json.loads(path.read_text(encoding="utf8"))
        good = isinstance(note["runs"], dict) and all(isinstance(words, list) for words in note["runs"].values())
    except (ValueError, KeyError, TypeError, OSError):
        good = False
    return note if good else {"runs": {}}


def number(value: object) -> float | None:
    """A value from a file, if it is a number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
