"""Which files a command line chooses: of models, methods, experiments, protocols of timing, recipes, launchers.

Hydra ignores a file of experiments/ that does not exist, accepts `method=../method/fastv` and the last of two methods
silently, and lists the known names in twenty lines. Here the choices of every group are checked before anything is
composed; a wrong one gets one line with the nearest names.
"""

from __future__ import annotations

import argparse
import difflib
import fnmatch
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override
from hydra.errors import OverrideParseException

EXPERIMENTS = "experiments"


def complaint(arguments: Sequence[str], conf: Path) -> str | None:
    """One line about the first choice that does not exist; None if all exist.

    Args:
        arguments: The command line's, without the program's name. What the chosen files of experiments/ sweep is
            checked, too.
        conf: Hydra's configuration folder.
    """
    overrides = list(parsed(arguments))
    more = [folder for folder in searched(arguments, overrides) if folder.is_dir()]
    with hydra.initialize_config_dir(str(conf), version_base="1.3"):
        sources = GlobalHydra.instance().config_loader().get_sources()

        def options(group: str) -> list[str]:
            found = {path.stem for folder in more for path in (folder / group).glob("*.yaml")}
            # not the loader's get_group_options, which copies every configuration that Hydra knows at each call
            there = [source for source in sources if source.is_group(group)]
            return sorted(found.union(*(source.list(group, ObjectType.CONFIG) for source in there)))

        known = {override.key_or_group: options(override.key_or_group) for override in overrides}
        found = wrong(overrides, known)
        for name in {} if found else chosen(overrides, EXPERIMENTS):
            path = next(path for folder in (*more, conf) if (path := folder / EXPERIMENTS / f"{name}.yaml").is_file())
            swept = list(swept_by(path))
            known = {override.key_or_group: options(override.key_or_group) for override in swept}
            if (inside := wrong(swept, known)) is not None:
                return f"{path}: {inside}"
    return found


def hint(arguments: Sequence[str], conf: Path) -> str | None:
    """A note for a likely slip: `experiment` names the table of the runs, `experiments` chooses what to run."""
    given = {override.key_or_group: values(override) for override in parsed(arguments)}
    name = (given.get("experiment") or [None])[0]
    if EXPERIMENTS in given or not (conf / EXPERIMENTS / f"{name}.yaml").is_file():
        return None
    return f"note: experiment={name} only puts this run into that table; experiments={name} runs what its file says"


def parsed(arguments: Sequence[str]) -> Iterator[Override]:
    """The overrides among the arguments; anything else is left to Hydra."""
    parser = OverridesParser.create()
    for argument in arguments:
        if argument.startswith("-") or not ("=" in argument or argument.startswith("~")):
            continue
        try:
            yield from parser.parse_overrides([argument])
        except OverrideParseException:
            return  # Hydra stops at the same word, and shows the place


def swept_by(experiment: Path) -> Iterator[Override]:
    """The sweeps of a file of experiments/, as overrides."""
    node: Any = yaml.safe_load(experiment.read_text(encoding="utf8"))
    for key in ("hydra", "sweeper", "params"):
        node = node.get(key) if isinstance(node, dict) else None
    yield from parsed([f"{key}={value}" for key, value in (node or {}).items()])


def searched(arguments: Sequence[str], overrides: Sequence[Override]) -> Iterator[Path]:
    """Further folders of configuration that the command line names: --config-dir, hydra.searchpath."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    if given := parser.parse_known_args(list(arguments))[0].config_dir:
        yield Path(given)
    for override in overrides:
        if override.key_or_group == "hydra.searchpath" and isinstance(named := override.value(), list):
            for text in map(str, named):
                if text.startswith("pkg://"):
                    yield Path(str(files(text.removeprefix("pkg://").replace("/", "."))))
                else:
                    yield Path(text.removeprefix("file://"))


def chosen(overrides: Sequence[Override], group: str) -> Iterator[str]:
    """The names that the command line chooses in a group, patterns left out."""
    for override in overrides:
        if override.key_or_group == group:
            yield from (str(value) for value in values(override) if not isinstance(value, Glob))


def values(override: Override) -> list[Any]:
    """The values of an override, one for each run of a sweep."""
    value: Any = override.value()
    given = value.list if isinstance(value, ChoiceSweep) else [value]
    return [getattr(one, "text", one) for one in given]  # of a quoted word its text


def wrong(overrides: Sequence[Override], known: dict[str, list[str]]) -> str | None:
    """One line about the first override of a group whose choice does not exist.

    Args:
        overrides: All of them, in order.
        known: The names that exist, by group; empty for a dial, which is not a group.
    """
    seen: dict[str, str] = {}
    for override in overrides:
        group, given = override.key_or_group, override.input_line or ""
        options = known[group]
        if not options:
            continue
        listed = f"{group} is one of {', '.join(options)}"
        ours = not group.startswith("hydra/")  # Hydra's own groups may be added to
        if ours and (override.is_delete() or override.is_add() or override.package is not None):
            return f"{given}: a {group} is chosen by {group}=NAME alone; {listed}"
        if group in seen:
            return f"{group} is given twice, {seen[group]} and {given}: give one, or sweep with -m {group}=ONE,OTHER"
        seen[group] = given
        for value in values(override):
            if isinstance(value, Glob):
                matching = [name for name in options if any(fnmatch.fnmatch(name, one) for one in value.include)]
                if not matching:
                    return f"{given} fits no {group}; {listed}"
            elif not isinstance(value, str | int) or isinstance(value, bool) or str(value) not in options:
                if group == "model" and ("/" in str(value) or Path(str(value)).is_dir()):
                    return (
                        f"unknown model {value!r}: a checkpoint of your own is model=folder model.path={value} "
                        f"model.name=mine (or model=llava_1_5_7b model.path={value}, in place of that one's); {listed}"
                    )
                return f"unknown {group} {value!r}{near(str(value), options)}; {listed}"
    return None


def near(name: str, options: Sequence[str]) -> str:
    """The nearest names as a question; "" if none is near."""
    close = difflib.get_close_matches(name.rpartition("/")[2], options, 3, 0.5)
    return f", did you mean {' or '.join(close)}?" if close else ""
