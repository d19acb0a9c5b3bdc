"""Checks the command line's overrides before Hydra composes: one line where Hydra prints seven, or a traceback.

The files that are chosen have been checked before (pdrop/cli/choices.py); here are the parts and values of dials.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from pdrop.cli.choices import near, searched, values
from pdrop.cli.compose import KINDS, kind_of

CFG = ("--cfg", "-c")
WITH_VALUE: tuple[str, ...] = (
    *CFG,
    "--package",
    "-p",
    "--config-dir",
    "-cd",
    "--config-name",
    "-cn",
    "--config-path",
    "-cp",
)
WITH_VALUE += ("--experimental-rerun", "--info", "-i")
LISTS = ("tasks", "task_folders", "layers")  # dials that take several values at once
OF_PARTS = ("schedule",)  # settings that the method's file composes of parts, not dials with one value


def misfit(arguments: Sequence[str], conf: Path, config: str) -> str | None:
    """One line about a word that is not an override, an unknown part, or a value of another kind; otherwise None.

    Args:
        arguments: The command line's, without the program's name. Every value of a sweep is checked.
        conf: Hydra's configuration folder.
        config: The command's file in it, without .yaml.
    """
    wrong: str | None
    try:
        overrides = [one for word in words(arguments) for one in OverridesParser.create().parse_overrides([word])]
    except OverrideParseException as error:
        broken = next((word for word in words(arguments) if not parses(word)), "")
        return f"{broken!r} is not a dial: write name=value ({first_line(error)})"
    if (wrong := several(arguments, overrides) or no_switch(overrides) or of_parts(overrides)) is not None:
        return wrong
    if not overrides or any(searched(arguments, overrides)):  # other folders may have other types: left to Hydra
        return None
    with hydra.initialize_config_dir(str(conf), version_base="1.3"):
        try:
            cfg = hydra.compose(config, [one for override in overrides for one in first_of(override)])
        except (HydraException, OmegaConfBaseException) as error:
            return one_by_one(overrides, conf, config) or first_line(error)
        for override in overrides:
            if (wrong := other_kind(cfg, override)) is not None:
                return wrong
    return None


def spelled_out(arguments: Sequence[str]) -> list[str]:
    """The command line with short forms in full: workers=8 is workers.count=8."""
    return [re.sub(r"^workers=(?!\{)", "workers.count=", word) for word in arguments]


def several(arguments: Sequence[str], overrides: Sequence[Override]) -> str | None:
    """One line about several values without -m; an experiment's file may make the command a sweep."""
    if {"-m", "--multirun"} & set(arguments) or any(
        one.key_or_group in ("experiments", "hydra.mode") for one in overrides
    ):
        return None
    for override in overrides:
        if override.is_sweep_override():
            name, _, given = (override.input_line or "").partition("=")
            listed = f", or give a list, {name}=[{given}]" if name in LISTS else ""
            return f"{name}={given} is several values: sweep over them with -m{listed}"
    return None


def no_switch(overrides: Sequence[Override]) -> str | None:
    """One line about a number for a dial that is true or false: 5 would be true."""
    for override in overrides:
        name = override.key_or_group
        if override.is_delete() or "." in name or kind_of(name) != KINDS[bool]:
            continue
        for value in values(override):
            if isinstance(value, int | float) and not isinstance(value, bool):
                return f"{name} is {KINDS[bool]}, not {value}"
    return None


def of_parts(overrides: Sequence[Override]) -> str | None:
    """One line about a single value for settings that have parts."""
    for override in overrides:
        if override.key_or_group in OF_PARTS and not override.is_delete() and not isinstance(override.value(), dict):
            given = (override.input_line or "").partition("=")[2]
            return (
                f"{override.key_or_group} comes with the method, and is no word such as {given}: set layers=[8,16,24], "
                "stages or ratio, or choose another method"
            )
    return None


def flags_first(arguments: Sequence[str]) -> list[str]:
    """The arguments with options first: argparse accepts none after an override."""
    given = list(words(arguments))
    return [*(word for word in arguments if word not in given), *given]


def one_by_one(overrides: Sequence[Override], conf: Path, config: str) -> str | None:
    """One line about the first override that cannot be composed, or about a file of conf/ that cannot without any."""
    taken: list[str] = []
    try:
        cfg = hydra.compose(config)
    except (HydraException, OmegaConfBaseException) as error:
        why = " ".join(line.strip() for line in str(error).splitlines()[:2])
        return f"{conf / config}.yaml cannot be composed ({why}): undo its edit, or start again if pdrop was updated"
    for override in sorted(overrides, key=lambda one: "." in one.key_or_group):  # files before their parts
        taken += first_of(override)
        try:
            cfg = hydra.compose(config, taken)
        except (HydraException, OmegaConfBaseException) as error:
            return told(override, first_of(override)[0], cfg, error)
    return None


def words(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments that should be overrides: neither options nor values of options."""
    for place, word in enumerate(arguments):
        if not word.startswith("-") and (place == 0 or arguments[place - 1] not in WITH_VALUE):
            yield word


def parses(word: str) -> bool:
    """Whether Hydra can read it as an override."""
    try:
        OverridesParser.create().parse_overrides([word])
    except OverrideParseException:
        return False
    return True


def first_of(override: Override) -> list[str]:
    """An override with its value in the first run of a sweep."""
    if not override.is_sweep_override():
        return [override.input_line or ""]
    if isinstance(override.value(), Glob):
        return []
    return [f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}"]


def told(override: Override, given: str, cfg: DictConfig, error: Exception) -> str:
    """One line that says what is wrong with an override."""
    name = override.key_or_group
    node: Any = cfg
    for part in name.split("."):
        if isinstance(node, DictConfig) and part not in node:
            parts = [str(key) for key in node if not str(key).startswith("_")]
            where = name.rpartition(f".{part}")[0] or "the command line"
            return f"{given}: {where} has no {part!r}{near(part, parts)}; it has {', '.join(parts) or 'nothing to set'}"
        node = node[part] if isinstance(node, DictConfig) else None
    kind = kind_of(name)
    return (
        f"{given}: {first_line(error.__cause__ or error)}"
        if kind == "a word"
        else f"{name} is {kind}, not {given.partition('=')[2]}"
    )


def other_kind(cfg: DictConfig, override: Override) -> str | None:
    """One line about the first value of a sweep that is of another kind than its dial."""
    name = override.key_or_group
    if not override.is_choice_sweep() or isinstance(OmegaConf.select(cfg, name), DictConfig):
        return None
    for value in values(override):
        copy = cfg.copy()
        try:
            with open_dict(copy):
                OmegaConf.update(copy, name, value, merge=False)
        except OmegaConfBaseException:
            return f"{name} is {kind_of(name)}, not {value!r}"
    return None


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def shown(arguments: Sequence[str]) -> list[str]:
    """The command line; for --cfg with a sweep, which Hydra refuses, that of the sweep's first run."""
    if not any(word.split("=")[0] in CFG for word in arguments):
        return list(arguments)
    given = list(words(arguments))
    options = [word for word in arguments if word not in (*given, "-m", "--multirun")]
    overrides = [one for word in given for one in OverridesParser.create().parse_overrides([word])]
    return [*(first for override in overrides for first in first_of(override)), *options]
