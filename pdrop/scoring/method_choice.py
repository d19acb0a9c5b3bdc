"""A method and its schedule from conf/method/, without Hydra: for a command line that is not ours.

Another program's arguments must mean what the same words mean to run.py, so they are put into the same files. Of
Hydra's language these need one thing, `${dial}`, which is filled with what was given or conf/run.yaml's default.

    method, schedule = choose("random", {"ratio": 0.3, "seed": 1})
    schedule(32)            # Schedule('8:0.3 16:0.09 24:0.027')
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from pdrop.methods.base import Method
from pdrop.methods.random_drop import twin_of
from pdrop.schedule import Schedule

PACKAGE = Path(__file__).resolve().parent.parent
# in a checkout the configuration lies beside the package, in an installed package inside it
CONF = next(folder for folder in (PACKAGE.parent / "conf", PACKAGE / "conf") if (folder / "run.yaml").exists())
PARTS = ("method", "schedule")  # of a method's file


def choices() -> list[str]:
    """The names of the methods: the files of conf/method/."""
    return sorted(path.stem for path in (CONF / "method").glob("*.yaml"))


@functools.cache
def defaults() -> dict[str, Any]:
    """conf/run.yaml's dials, and the method it chooses under "method"."""
    dials: dict[str, Any] = yaml.safe_load((CONF / "run.yaml").read_text(encoding="utf8"))
    chosen = {group: name for entry in dials["defaults"] if isinstance(entry, dict) for group, name in entry.items()}
    return dials | {"method": chosen["method"]}


def choose(name: str, given: Mapping[str, Any]) -> tuple[Method | None, Callable[[int], Schedule]]:
    """The method of a file of conf/method/ and a function from the number of decoder layers to its schedule.

    Args:
        name: One of `choices()`.
        given: Dials by their names (ratio, layers, positions, twin, seed, ...), and parts of the file by their path,
            such as {"schedule.budget": 192}.

    Raises:
        ValueError: If there is no such method, its file has no such part, or its constructor refuses a value.
    """
    if name not in choices():
        raise ValueError(f"unknown method {name!r}: choose {', '.join(choices())}")
    path = CONF / "method" / f"{name}.yaml"
    nodes: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf8"))
    dials = defaults() | dict(given)
    filled = {part: _fill(nodes[part], dials, path) for part in PARTS}
    for key, value in given.items():
        part, dot, argument = key.partition(".")
        if not dot:
            continue
        known = [other for other in filled.get(part) or {} if other != "_target_"]
        if argument not in known:
            raise ValueError(f"{key}: {path.name} has there {', '.join(known) or 'nothing'}")
        filled[part][argument] = value
    if filled["method"] is not None and dials["positions"] is not None:
        filled["method"]["positions"] = dials["positions"]
    method = None if filled["method"] is None else _build(filled["method"])
    if dials["twin"] and method is not None:
        method = twin_of(method, dials["seed"])
    return method, lambda layers: _build(filled["schedule"], num_layers=layers)


def _fill(node: Any, dials: Mapping[str, Any], path: Path) -> Any:
    """`node` with each "${dial}" replaced by the dial's value."""
    if isinstance(node, dict):
        return {key: _fill(value, dials, path) for key, value in node.items()}
    if isinstance(node, list):
        return [_fill(value, dials, path) for value in node]
    if not isinstance(node, str) or "${" not in node:
        return node
    dial = re.fullmatch(r"\$\{(\w+)\}", node)
    if dial is None or dial[1] not in dials:
        raise ValueError(f"{path}: {node} is not a dial of run.yaml, which is all that can be filled in without Hydra")
    return dials[dial[1]]


def _build(node: Mapping[str, Any], **more: Any) -> Any:
    nested = {key: _build(value) for key, value in node.items() if isinstance(value, dict) and "_target_" in value}
    arguments = {key: value for key, value in node.items() if key != "_target_"} | nested | more
    module, _, target = node["_target_"].rpartition(".")
    try:
        return getattr(import_module(module), target)(**arguments)
    except TypeError as error:  # an argument that it does not take
        raise ValueError(f"{target}: {error}") from error
