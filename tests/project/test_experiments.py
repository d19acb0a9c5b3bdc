"""Every file of experiments/ says what it reproduces, and every job of its sweep composes and fits its model.

pytest tests/project/test_experiments.py
"""

from __future__ import annotations

import functools
import itertools
import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from pdrop.cli.compose import CONF, choices, instantiate
from pdrop.cli.run import check_dials
from pdrop.schedule import Schedule

FOLDER = Path(__file__).resolve().parents[2] / "experiments"
FILES = sorted(FOLDER.glob("*.yaml"))
GROUPS = {path.name for path in CONF.iterdir() if path.is_dir()} | {"experiments"}
LAYERS = {"embedded": 12, "llava_1_5_7b": 32, "qwen2_5_vl_7b": 28}


def commands(path: Path) -> list[str]:
    """The commands that the head of a file shows; a backslash continues one in the next line."""
    text = re.sub(r" \\\n#\s+", " ", path.read_text())
    return re.findall(r"^#\s+(python run\.py .+?)(?:\s{2,}.*)?$", text, re.M)


def jobs(path: Path, arguments: list[str]) -> list[list[str]]:
    """The jobs of the file's sweep; what the command line gives wins, as in Hydra's basic sweeper."""
    params = OmegaConf.load(path).hydra.sweeper.params
    swept = {}
    for override in OverridesParser.create().parse_overrides([f"{k}={v}" for k, v in params.items()] + arguments):
        key = override.get_key_element()
        values = override.sweep_string_iterator() if override.is_sweep_override() else [override.get_value_string()]
        swept[key] = [f"{key}={value}" for value in values]
    return [list(job) for job in itertools.product(*swept.values())]


@functools.cache  # composing takes a while
def schedules(path: Path, command: str) -> dict[str, set[Schedule]]:
    """The schedules that a command runs, by method."""
    arguments = [a for a in shlex.split(command)[2:] if a != "-m"]
    assert check_dials(arguments) is None
    found: dict[str, set[Schedule]] = {}
    composed: dict[tuple[str, ...], DictConfig] = {}  # by the files that a job chooses; what is left are values
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for job in jobs(path, arguments):
            if any(a.startswith("seed=") and a != "seed=0" for a in job):
                continue  # the seed changes no schedule
            chosen = tuple(a for a in job if a.partition("=")[0] in GROUPS)
            if chosen not in composed:
                composed[chosen] = compose("run", list(chosen))
            config = composed[chosen].copy()
            for override in OverridesParser.create().parse_overrides([a for a in job if a not in chosen]):
                OmegaConf.update(config, override.key_or_group, override.value())
            assert config.experiment, "no experiment, no table"
            method = next(a.split("=")[1] for a in job if a.startswith("method="))
            schedule = instantiate(config.schedule, num_layers=LAYERS[config.model.name])
            found.setdefault(method, set()).add(schedule)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_head_says_what_how_and_how_long(path: Path) -> None:
    head = "\n".join(itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()))
    assert f"python run.py -m experiments={path.stem}" in head
    assert re.search(r"minutes? on 2 CPU\s+(# )?cores", head), "expected time, on which hardware"
    assert re.search(r"arXiv|[Oo]urs|first table", head), "what it reproduces"
    assert path.stem in choices("experiments"), "run.py finds it"


@pytest.mark.product(2)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_job_of_every_command_fits(path: Path) -> None:
    for command in commands(path):
        other = re.search(r"experiments=(\w+)", command)
        assert other is not None
        found = schedules(FOLDER / f"{other[1]}.yaml", command)
        assert all(not any(group) for method, group in found.items() if method == "none")
        assert all(all(group) for method, group in found.items() if method != "none")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_model_has_an_experiment_of_its_own(path: Path) -> None:
    own = OmegaConf.load(path).experiment
    for command in commands(path):
        named = dict(argument.split("=", 1) for argument in shlex.split(command)[3:])
        if "model" not in named:
            continue
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("run", [argument for argument in shlex.split(command)[3:] if "layers" not in argument][:4])
        assert config.experiment == f"{own}_{named['model'].split('_')[0]}", "models would share one name"


def test_average_token_budgets_are_the_papers() -> None:
    for name in ("tokens", "tokens_fastv"):
        own = [c for c in commands(FOLDER / f"{name}.yaml") if c.split()[3] == f"experiments={name}"]
        assert len(own) == 2, "embedded and real"
        for command in own:
            layers = LAYERS["llava_1_5_7b" if "llava" in command else "embedded"]
            for method, group in schedules(FOLDER / f"{name}.yaml", command).items():
                if method != "none":
                    means = sorted(round(schedule.mean_keep(layers), 3) for schedule in group)
                    assert means == [0.111, 0.222, 0.333], (name, method)


def test_redundancy_is_a_full_grid() -> None:
    grid = {(k, r) for k in (1, 3, 6, 9) for r in (0.0, 0.1, 0.25, 0.5)}
    found = schedules(FOLDER / "redundancy.yaml", "python run.py -m experiments=redundancy")
    assert set(found) == {"none", "pyramiddrop", "random"}
    for method in ("pyramiddrop", "random"):
        assert {(s.stages[0].layer, s.stages[0].keep) for s in found[method] if len(s) == 1} == grid
