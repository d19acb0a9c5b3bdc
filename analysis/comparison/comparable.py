"""Which runs may be in one table: an experiment's runs are refused if they differ, a whole store is split.

The settings (limit, dtype, ...), the data and prompts, and the machine must be the same. Models may differ in their own
settings; if they also differ in others, each gets its own table.
"""

from __future__ import annotations

import hashlib
import shlex
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from pdrop.commands import typed
from pdrop.record import CLOSE_CONDITIONS, EQUAL_CONDITIONS, RunSpec, canonical_json

from ..store.load import ALL, Experiment, Run, by_task, timing

# a protocol sets most of them by family
OF_MODEL: tuple[str, ...] = ("weights", "revision", "prompt", "image_mode", "system", "image_backend", "min_pixels")
OF_MODEL += ("max_pixels", "max_tiles", "wrapper", "lengths", "max_new_tokens", "stop", "image_placing")
OF_MODEL += ("frames", "frame_sampling", "fps", "frame_times", "min_frame_pixels", "max_frame_pixels")
OF_MODEL += ("max_video_pixels",)
# fields that tables compare, and fields with their own checks
COMPARED = ("method", "method_args", "schedule", "positions", "seed", "tasks", "latency")
OWN_WAY = ("model", "model_path", "model_fingerprint", "versions", "code", "task_files", "format")
# all others, so that a dial that is added to RunSpec separates runs without an edit here
ASKED = tuple(one.name for one in fields(RunSpec) if one.name not in {*OF_MODEL, *COMPARED, *OWN_WAY})
MOST = 6  # commands that a remedy lists
Kind = Literal["asked", "aged", "made"]  # other settings; older weights or packages; another machine, data, code


@dataclass
class Part:
    """Runs for one table. `stem` names its files."""

    stem: str
    title: str
    runs: list[Run]
    missing: list[str] = field(default_factory=list)
    times: bool = True


@dataclass
class Mixture:
    """A field that should have one value, in words, and the runs that do not have the newest run's value."""

    text: str
    kind: Kind
    odd: list[Run]


def mixtures(runs: Iterable[Run]) -> list[Mixture]:
    """What keeps runs out of one table, apart from times. Runs that are not done have no numbers."""
    done = [run for run in runs if run.done]
    found = [differing(name, spec_of(done, name), "asked") for name in ASKED]
    found.append(differing("versions", spec_of(done, "versions"), "aged"))
    alike = [run for run in done if len(answered_on(run)) < 2]
    found.append(differing("processor", [(run, run.record.environment.get("processor")) for run in alike], "made"))
    found.append(differing("device_name", [(run, device_of(run)) for run in alike], "made"))
    found.append(unlike(done))
    for model in sorted({run.record.spec.model for run in done}):
        those = [run for run in done if run.record.spec.model == model]
        found += [differing(f"{name} of {model}", spec_of(those, name), "asked") for name in OF_MODEL]
        places = {(run.record.spec.model_path, run.record.spec.revision) for run in those}
        pretrained = all(run.record.spec.weights == "pretrained" for run in those)
        kind: Kind = "aged" if len(places) == 1 and pretrained else "asked"  # checkpoints of one name; random seeds
        found.append(differing(f"model_fingerprint of {model}", spec_of(those, "model_fingerprint"), kind))
        for task, having in by_task(those).items():
            hashes = [(run, run.record.results[task].prompt_hash) for run in having]
            found.append(differing(f"prompt_hash of {task}", hashes, "made"))
    for task, having in by_task(done).items():
        for name in ("data_hash", "version", "main_metric", "n"):
            held = [(run, getattr(run.record.results[task], name)) for run in having]
            found.append(differing(f"{name} of {task}", held, "made"))
    found += uncommitted(done)
    return [mixture for mixture in found if mixture]


def answered_on(run: Run) -> list[str]:
    """The models of the devices that answered a run's questions; an older record does not name a CPU."""
    entries = run.record.environment.get("answered_by") or ()
    return sorted({str(entry["device"]) for entry in entries if entry.get("device")})


def device_of(run: Run) -> str | None:
    """The model of a run's device; where an older record names none it is a CPU."""
    environment = run.record.environment
    return environment.get("device_name") or environment.get("processor")


def unlike(done: Sequence[Run]) -> Mixture | None:
    """Runs that devices of several models answered: their numbers compare with no others, even of the same mixture."""
    mixed = [run for run in done if len(answered_on(run)) > 1]
    if not mixed or len(done) < 2:
        return None
    text = "; ".join(f"{' + '.join(answered_on(run))} in {run.folder}" for run in mixed)
    return Mixture(f"answered by devices of several models: {text}", "made", mixed)


def uncommitted(done: Sequence[Run]) -> list[Mixture | None]:
    """Differences in code between runs with uncommitted changes, whose commit does not tell their code.

    The digest of the package's sources must be one for all runs, and that of a method's own file (outside the package)
    one for that method's runs. Nothing is refused without uncommitted changes, or if only a configuration changed.
    """
    dirty = [run for run in done if run.record.environment.get("git_dirty")]
    if not dirty:
        return []
    package = [(run, run.record.environment.get("sources") or run.record.spec.code) for run in done]
    if mixed := differing("sources (some with uncommitted changes)", package, "made"):
        return [mixed]
    found = []
    for method in sorted({run.record.spec.method for run in dirty}):
        those = [run for run in done if run.record.spec.method == method]
        what = f"sources of {method} (some with uncommitted changes)"
        found.append(differing(what, spec_of(those, "code"), "made"))
    return found


def time_mixtures(runs: Iterable[Run]) -> list[Mixture]:
    """What keeps the times of runs out of one table.

    Commits may differ if the sources do not, and sources if the commit does not: a method's own file counts only for
    its own runs.
    """
    timed = [run for run in runs if run.done and run.record.cost and run.record.cost.prefill_time_ratio]
    found = [differing("latency (times are shown)", spec_of(timed, "latency"), "asked")]
    if not all(run.record.spec.code for run in timed) or len({run.record.spec.code for run in timed}) > 1:
        commits = [(run, run.record.environment.get("git_commit")) for run in timed]
        found.append(differing("git_commit (times are shown)", commits, "made"))
    measured = [run for run in timed if timing(run)]
    for name in EQUAL_CONDITIONS:
        seen = [(run, timing(run)["conditions"]["before"].get(name)) for run in measured]
        found.append(differing(f"{name} (times are shown)", seen, "made"))
    for name, share in CLOSE_CONDITIONS.items():
        noted = [(run, value) for run in measured if (value := timing(run)["conditions"]["before"].get(name))]
        values = [value for _, value in noted]
        if values and max(values) - min(values) > share * max(values):
            found.append(differing(f"{name} (times are shown)", noted, "made"))
    for name in ("cores", "threads"):
        held = [(run, run.record.environment.get(name)) for run in timed]
        found.append(differing(f"{name} (times are shown)", held, "made"))
    return [mixture for mixture in found if mixture]


def spec_of(runs: Iterable[Run], name: str) -> list[tuple[Run, Any]]:
    """Each run with this field of its spec."""
    return [(run, getattr(run.record.spec, name)) for run in runs]


def differing(what: str, held: Sequence[tuple[Run, Any]], kind: Kind) -> Mixture | None:
    """The mixture of these values; None if there is only one."""
    having: dict[str, list[Run]] = defaultdict(list)
    for run, value in held:
        having[str(value)].append(run)
    if len(having) < 2:
        return None
    text = "; ".join(f"{value} in {', '.join(run.folder for run in those)}" for value, those in having.items())
    last = max(held, key=lambda one: one[0].record.started_at)
    return Mixture(f"{what}: {text}", kind, [run for run, value in held if str(value) != str(last[1])])


def refuse_mixtures(experiment: Experiment, runs: Sequence[Run], times: bool = True, strict: bool = False) -> None:
    """Refuse runs of an experiment whose numbers may not be in one table.

    Args:
        experiment: The runs' experiment.
        runs: The runs, or those of one model.
        times: Whether times are shown; then code, cores and threads must be the same, too.
        strict: Refuse uncommitted changes even if all runs have the same (otherwise the table gets a footnote).

    Raises:
        ValueError: Naming each field that differs, its values, the folders that have them, and what to do.
    """
    scores = mixtures(runs)
    found = scores + (time_mixtures(runs) if times else [])
    dirty = [run for run in runs if run.done and run.record.environment.get("git_dirty")]
    if strict and dirty:
        folders = ", ".join(run.folder for run in dirty)
        found.append(Mixture(f"git_dirty: made with uncommitted changes: {folders}", "made", dirty))
    if found:
        listed = "\n  ".join(mixture.text for mixture in found)
        hint = "" if scores or len(found) == 0 or not times else "\nOr leave the times out: --no-times."
        raise ValueError(f"these runs cannot be in one table.\n  {listed}\n{remedy(experiment, found)}{hint}")


def remedy(experiment: Experiment, found: Sequence[Mixture]) -> str:
    """How to get one table: the runs to make again, if that helps, or a fresh start."""
    folder = experiment.results / "experiments" / experiment.name
    kinds = {mixture.kind for mixture in found}
    fresh = f"delete {folder} (the runs stay) and run the whole experiment again: finished runs are skipped"
    if "asked" in kinds:
        return f"To mend it, {fresh}. Other settings of what differs belong under a name of their own: experiment=NAME."
    odd = {run.folder: run for mixture in found for run in mixture.odd}
    force = ["force=true"] if "made" in kinds else []
    lines = dict.fromkeys("  " + shlex.join([*command(run), *force]) for run in odd.values())
    more = [f"  and {len(lines) - MOST} more: all that are named above beside the newest"] if len(lines) > MOST else []
    other = [] if force else [f"Or {fresh}."]
    return "\n".join(["To mend it, make these again, here and now:", *[*lines][:MOST], *more, *other])


def command(run: Run) -> list[str]:
    """The command line that makes the run again."""
    overrides = [f"{key}={value}" for key, value in run.overrides.items()] or run.record.command[1:]
    return [*typed("run").split(), *overrides]


def parts(experiment: Experiment, times: bool = True) -> list[Part]:
    """The tables of an experiment: one, or one per model if they cannot share one; for "all", those of the store."""
    if experiment.name == ALL:
        return store_parts(experiment, times)
    models = sorted({run.record.spec.model for run in experiment.runs})
    found = mixtures(experiment.runs) + (time_mixtures(experiment.runs) if times else [])
    if len(models) == 1 or not found:
        return [Part(experiment.name, experiment.name, experiment.runs, experiment.missing, times)]
    return [
        Part(
            f"{experiment.name}-{model}",
            f"{experiment.name}: {model}",
            [run for run in experiment.runs if run.record.spec.model == model],
            [name for name in experiment.missing if name.startswith(f"{model}-")],
            times,
        )
        for model in models
    ]


def store_parts(experiment: Experiment, times: bool) -> list[Part]:
    """The whole store in groups for one table each, the largest first; unfinished runs join similar runs."""
    settings: dict[str, dict[str, Any]] = {}
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in sorted(experiment.runs, key=lambda run: (not run.done, run.folder)):
        wanted = group_settings(run)
        like = [key for key in groups if settings[key].items() >= wanted.items()] if not run.done else []
        key = like[0] if like else canonical_json(wanted)
        settings.setdefault(key, wanted)
        groups[key].append(run)
    ordered = sorted(groups, key=lambda key: (-len(groups[key]), key))
    if len(ordered) == 1:
        return [Part(ALL, ALL, groups[ordered[0]], times=times and not time_mixtures(groups[ordered[0]]))]
    every = dict.fromkeys(name for key in ordered for name in settings[key])
    names = [n for n in every if len({str(settings[key][n]) for key in ordered if n in settings[key]}) > 1]
    return [
        Part(
            f"{ALL}-{number}",
            f"{ALL}, {number} of {len(ordered)}: "
            + ", ".join(in_words(name, settings[key][name]) for name in names if name in settings[key]),
            groups[key],
            times=times and not time_mixtures(groups[key]),
        )
        for number, key in enumerate(ordered, start=1)
    ]


def group_settings(run: Run) -> dict[str, Any]:
    """The settings that must be equal within one table of the store; for a run that is not done, those known."""
    spec, environment, results = run.record.spec, run.record.environment, run.record.results
    wanted: dict[str, Any] = {name: getattr(spec, name) for name in ("model", *ASKED, *OF_MODEL)}
    wanted |= {"model_fingerprint": spec.model_fingerprint, "versions": spec.versions, "tasks": sorted(spec.tasks)}
    if run.done:
        wanted |= {"processor": environment.get("processor"), "device_name": device_of(run)}
        if len(answered_on(run)) > 1:
            wanted["answered by"] = f"several devices, {spec.run_id}"
        wanted["data and prompts"] = [
            [task, r.data_hash, r.prompt_hash, r.version, r.main_metric, r.n] for task, r in sorted(results.items())
        ]
    return wanted


def in_words(name: str, value: Any) -> str:
    """One setting of a group in a few words."""
    if name == "limit":
        return "all samples" if value is None else f"first {value} samples"
    if name == "tasks":
        return "+".join(value) if len(value) < 4 else f"{len(value)} tasks"
    if name == "data and prompts":
        digest = hashlib.sha256(canonical_json(value).encode()).hexdigest()
        return f"{sum(entry[-1] for entry in value)} questions ({digest[:6]})"
    return str(value) if name == "model" else f"{name} {str(value)[:40]}"
