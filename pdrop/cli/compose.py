"""From conf/ to plain settings, in one place: a dial means the same to run.py, train.py, lmms-eval and Python.

    settings({"model": "llava_1_5_7b", "method": "fastv", "ratio": 0.25, "tasks": ["pope"]})
    method, schedule = choose("random", {"ratio": 0.3, "seed": 1})
    schedule(32)                                  # Schedule('8:0.3 16:0.09 24:0.027')

The files of conf/ have the dials and their defaults; here are the types that they do not show. Light to import: the
classes that a configuration names are imported when it is instantiated.
"""

from __future__ import annotations

import functools
import pkgutil
import textwrap
from collections.abc import Mapping, Sequence
from collections.abc import Sequence as AbcSequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException, ValidationError

from pdrop.record import RunSpec, check_seed, check_word
from pdrop.runs.device import chosen
from pdrop.schedule import Schedule

if TYPE_CHECKING:
    from pdrop.methods.base import Method
    from pdrop.runs.settings import MakeSchedule, Settings

HERE = Path(__file__).resolve().parents[1]
# in a checkout the configuration is next to the package, in an installed package inside it
CONF = next(folder for folder in (HERE.parent / "conf", HERE / "conf") if (folder / "run.yaml").exists())
PARTS = ("method", "schedule")  # of a method's file
KINDS = {int: "a whole number", float: "a number", bool: "true or false"}


def choices(group: str) -> list[str]:
    """The files of a folder of conf/."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def listed(group: str) -> str:
    """The files of a folder of conf/ as --help lists them, in 80 columns: next to their dial, or below a heading."""
    indent = 2 if group == "experiments" else 14
    return ("\n" + " " * indent).join(textwrap.wrap(", ".join(choices(group)), 79 - indent))


# ---------------------------------------------------------------------- types


@dataclass
class ModelDials:
    """A file of conf/model/; conf/checkpoint.yaml has the defaults of what it leaves out."""

    name: str = MISSING
    path: str = MISSING  # a folder, a hub id, or package://package.name/folder
    visual_tokens: int | None = MISSING  # of the prompt that budgets and breakdowns are computed for
    text_tokens: int | None = MISSING


@dataclass
class DroppingDials:
    """What to drop: the same for run.py and train.py."""

    method: Any = MISSING  # an object with _target_, or null
    schedule: Any = MISSING
    stages: int = MISSING
    ratio: float = MISSING
    layers: list[int] | None = MISSING
    positions: str | None = MISSING
    twin: bool = MISSING


@dataclass
class WorkersDials:
    """How many processes answer: see pdrop.runs.worker_dials.Workers. `workers=8` is short for `workers.count=8`."""

    count: int = MISSING
    address: str | None = MISSING
    gpus: float | None = MISSING
    threads: int = MISSING


@dataclass
class RunDials(DroppingDials):
    """The dials of run.py that are not fields of RunSpec; for the others, conf/ has names and defaults."""

    latency: Any = MISSING
    budget: str | None = MISSING
    tasks: Any = MISSING
    task_folders: list[str] = MISSING
    results: str = MISSING
    locks: str = MISSING
    experiment: str | None = MISSING
    force: bool = MISSING
    retry: str | None = MISSING
    plan: bool = MISSING
    prefetch: int | None = MISSING
    picture_cache: float = MISSING
    workers: WorkersDials = field(default_factory=WorkersDials)


def typed(own: type, file: str, model: type | None = None) -> type:
    """`own` with a field for every other dial of a file of conf/; its type is that of RunSpec's field of this name."""
    values: Any = OmegaConf.to_container(OmegaConf.load(CONF / file), resolve=False)
    hints, given = get_type_hints(RunSpec), get_type_hints(own)
    more: list[tuple[str, Any, Any]] = []
    for name in [name for name in values if name not in (*given, "defaults", "hydra")]:
        kind = str if get_origin(hints[name]) is Literal else hints[name]
        open_to_null = values[name] is None and type(None) not in get_args(kind)  # null: set elsewhere
        more.append((name, kind | None if open_to_null else kind, field(default=MISSING)))
    if model is not None:
        more.append(("model", model, field(default_factory=model)))
    return make_dataclass(own.__name__, more, bases=(own,))


CheckpointConfig = typed(ModelDials, "checkpoint.yaml")
RunConfig = typed(RunDials, "run.yaml", model=CheckpointConfig)
OWN_TYPES: dict[str, type] = {"model": CheckpointConfig, "workers": WorkersDials}
ConfigStore.instance().store("schema", RunConfig)
OmegaConf.register_new_resolver("choices", lambda group: listed(group), replace=True)


# ---------------------------------------------------------------------- without Hydra's command line


@functools.cache
def _composed(overrides: tuple[str, ...]) -> tuple[DictConfig, str]:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("run", list(overrides), return_hydra_config=True)
    name = cfg.hydra.runtime.choices["method"]
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg, name


def compose(dials: Mapping[str, Any]) -> tuple[DictConfig, str]:
    """conf/run.yaml with these dials, and the name of its method.

    Args:
        dials: By name; parts of a file by their path, such as {"schedule.budget": 192}. `model`, `method` and `latency`
            name files of conf/.

    Raises:
        ValueError: If there is no such dial, file or part, or a value has the wrong type.
    """
    groups = {name: dials[name] for name in ("model", "method", "latency") if name in dials}
    for group, name in groups.items():
        if name not in choices(group):
            raise ValueError(f"unknown {group} {name!r}: choose {', '.join(choices(group))}")
    cfg, method = _composed(tuple(f"{group}={name}" for group, name in groups.items()))
    cfg = cfg.copy()
    for name, value in dials.items():
        if name not in groups:
            short = name == "workers" and not isinstance(value, Mapping)
            _set(cfg, "workers.count" if short else name, value, f"{method}.yaml")
    return cfg, method


def _set(cfg: DictConfig, name: str, value: Any, file: str) -> None:
    part, _, argument = name.rpartition(".")
    if part in PARTS:
        known = [other for other in cfg[part] or {} if other != "_target_"]
        if argument not in known:
            raise ValueError(f"there is no {name}: {file} has {', '.join(known) or 'nothing to set'}")
    try:
        OmegaConf.update(cfg, name, value, merge=False)
    except ValidationError as error:
        raise ValueError(f"{name} is {kind_of(name)}, not {value!r}") from error
    except OmegaConfBaseException as error:
        raise ValueError(f"there is no dial {name!r}") from error


def kind_of(name: str) -> str:
    """The kind of value that a dial takes, in words."""
    group, dot, argument = name.partition(".")
    hint = get_type_hints(OWN_TYPES.get(group, RunConfig)).get(argument if dot else name, str)
    kinds = [kind for kind in get_args(hint) if kind is not type(None)] if type(None) in get_args(hint) else [hint]
    if get_origin(kinds[0]) is list:
        return (
            f"a list such as {name}=[8,16,24]" if get_args(kinds[0]) == (int,) else f"a list such as {name}=[one,two]"
        )
    return KINDS.get(kinds[0], "a word")


def choose(name: str, dials: Mapping[str, Any]) -> tuple[Method | None, MakeSchedule]:
    """The method of a file of conf/method/, and a function from the number of decoder layers to its schedule.

    Raises:
        ValueError: If there is no such method, its file has no such part, or a value is refused.
    """
    cfg, name = compose({**dials, "method": name})
    _, method, schedule = dropping(cfg, name)
    return method, schedule


def settings(dials: Mapping[str, Any]) -> Settings:
    """The settings of a run with these dials: see `compose`.

    Raises:
        ValueError: If something that was asked for does not exist or does not fit.
    """
    return settings_of(*compose(dials))


# ---------------------------------------------------------------------- from a composed configuration


def settings_of(cfg: DictConfig, name: str, asked: bool | None = None) -> Settings:
    """A composed configuration as resolved settings.

    Args:
        cfg: Of conf/run.yaml.
        name: The method's: the file that was chosen.
        asked: Whether the model is to answer questions; None: only if there are tasks.

    Raises:
        ValueError: If something that was asked for does not exist or does not fit.
    """
    from pdrop.runs.settings import resolve
    from pdrop.timing.protocol import TimingProtocol

    try:
        dials: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:  # such as a value that a file of conf/ leaves to the user
        raise ValueError("; ".join(line.strip() for line in str(error).splitlines() if line.strip())) from error
    dials |= {
        "device": chosen(dials["device"]),
        "tasks": task_names(dials["tasks"], dials["task_folders"]),
        "families": families(dials["protocol"] or dials["model"]["protocol"]),
    }
    return resolve(dials, *dropping(cfg, name), instantiate(dials["latency"], "latency", TimingProtocol), asked)


def families(protocol: str) -> Any:
    """The settings of a protocol (a file of conf/protocols/), by family.

    Raises:
        ValueError: If there is no protocol of this name.
    """
    check_word("protocol", protocol, choices("protocols"))
    return OmegaConf.to_object(OmegaConf.load(CONF / "protocols" / f"{protocol}.yaml"))


def dropping(cfg: DictConfig, name: str) -> tuple[str, Method | None, MakeSchedule]:
    """The method's name, the method, and its schedule for a number of layers, from the dials of dropping.

    Args:
        cfg: The composed configuration; a budget changes its dials.
        name: The method's: the file that was chosen.
    """
    from pdrop.methods.base import Method

    check_seed("seed", cfg.seed)
    node: Any = None if cfg.method is None else OmegaConf.to_container(cfg.method, resolve=True)
    if node is not None and cfg.positions is not None:
        node["positions"] = cfg.positions
    method = None if node is None else instantiate(node, "method", Method)
    if cfg.twin and method is not None:
        from pdrop.methods.random_drop import twin_of

        method, name = twin_of(method, cfg.seed), f"random_{name}"
    return name, method, functools.partial(schedule_of, cfg)


def schedule_of(
    cfg: DictConfig, num_layers: int, ratio: float | None = None, layers: Sequence[int] | None = None
) -> Any:
    """The schedule of a configuration for a decoder of that many layers; dials given here replace its own.

    Raises:
        ValueError: If the schedule refuses its arguments.
    """
    turned: dict[str, Any] = {} if ratio is None else {"ratio": ratio}
    turned |= {} if layers is None else {"layers": list(layers)}
    asked = OmegaConf.merge(cfg, turned) if turned else cfg  # a merge copies all of it
    node = OmegaConf.to_container(asked.schedule, resolve=True)
    return instantiate(node, "schedule", Schedule, num_layers=num_layers)


def instantiate(node: Any, dial: str = "", wanted: type | None = None, **arguments: Any) -> Any:
    """Make the object of a node with _target_; if its constructor refuses, the message is for the user, not Hydra's.

    Args:
        node: Its arguments are checked against the constructor's types before the call.
        dial: The node's name on the command line.
        wanted: The class that the object must have.
        arguments: More arguments.

    Raises:
        ValueError: If the constructor refuses, does not exist or makes something else, or an argument is of another
            kind.
    """
    node = OmegaConf.to_object(node) if OmegaConf.is_config(node) else node
    try:
        check_arguments(node, dial)
        made = hydra.utils.instantiate(node, **arguments)
        if wanted is not None and not isinstance(made, wanted):
            raise ValueError(f"{dial}._target_={node['_target_']} is not a {wanted.__module__}.{wanted.__name__}")
        return made
    except hydra.errors.InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, (ValueError, TypeError)):
            raise ValueError(str(cause)) from error
        raise
    except SystemExit as error:  # by a module of a method: the run must not end as if it were done
        raise ValueError(f"{node['_target_']}: its code called sys.exit({error.code!r})") from error


def check_arguments(node: Any, dial: str) -> None:
    """Check a node's arguments against the types in its constructor's signature.

    Raises:
        ValueError: If an argument is of another kind (the first is named), or _target_ cannot be imported.
    """
    target = node.get("_target_") if isinstance(node, Mapping) else None
    if not isinstance(target, str):
        raise ValueError(f"{dial} needs a _target_, such as pdrop.methods.fastv.FastV, not {target!r}")
    try:
        maker = pkgutil.resolve_name(target)
        hints = get_type_hints(vars(maker).get("__init__", maker) if isinstance(maker, type) else maker)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{dial}._target_={target} cannot be imported: {error}") from error
    except (TypeError, NameError):  # a signature without readable types
        return
    for name, value in node.items():
        if (hint := hints.get(name)) is not None and not fits(value, hint):
            raise ValueError(f"{dial}.{name} is {in_words(hint, f'{dial}.{name}')}, not {value!r}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of a plain type; other types than numbers, words and lists of them are not checked."""
    if kinds := [kind for kind in get_args(hint) if get_origin(hint) in (Union, UnionType)]:
        return any(fits(value, kind) for kind in kinds)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (str, bool, type(None)):
        return isinstance(value, hint)
    if get_origin(hint) in (list, tuple, AbcSequence):
        kinds = [kind for kind in get_args(hint) if kind is not Ellipsis]
        return isinstance(value, list | tuple) and all(fits(one, kinds[0]) for one in value if len(kinds) == 1)
    return True


def in_words(hint: Any, name: str) -> str:
    """A type in words, for messages."""
    kinds = list(get_args(hint)) if get_origin(hint) in (Union, UnionType) else [hint]
    words = [
        "null"
        if kind is type(None)
        else f"a list such as {name}=[1,2]"
        if get_origin(kind)
        else KINDS.get(kind, "a word")
        for kind in kinds
    ]
    return " or ".join(words)


def task_names(tasks: Any, folders: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of lmms-eval tasks from `tasks`: the name of a set (conf/task_sets/) or of a task, or a list of both.

    Raises:
        ValueError: If a name is unknown; close matches are named.
    """
    from pdrop.evaluation import task_index

    names: list[str] = []
    given = [tasks] if isinstance(tasks, str) else [] if tasks is None else tasks
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise ValueError(f"tasks is a set, a task, or a list of them such as tasks=[pope,mme], not {tasks!r}")
    for name in given:
        if name in choices("task_sets"):
            group: Any = OmegaConf.to_object(OmegaConf.load(CONF / "task_sets" / f"{name}.yaml"))
            names += group["tasks"]
        else:
            names.append(name)
    task_index.find(names, folders, also=choices("task_sets"))
    return tuple(dict.fromkeys(names))
