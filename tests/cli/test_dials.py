"""Dials: one way from conf/ to their use, whoever turns them; what they cannot be is one line before anything loads."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from analysis.comparison.comparable import ASKED, COMPARED, OF_MODEL, OWN_WAY
from pdrop import FastV, RandomDrop, attach, pyramid, single, solve
from pdrop.cli import compose
from pdrop.methods.base import Method
from pdrop.record import LATER, RunSpec, hashed
from pdrop.schedule import Schedule

ROOT = Path(__file__).resolve().parents[2]
ON_THE_WAY = ("cli/run.py", "cli/compose.py", "cli/lmms_command.py", "runs", "evaluation/lmms.py")
HERE = {"device": "cpu", "tasks": ["embedded_chart"]}


@pytest.mark.parametrize("dial", ["max_new_tokens", "image_mode", "attn_implementation"])
def test_a_dial_needs_its_value_its_field_and_its_use(dial: str) -> None:
    """Nothing between conf/ and the use of a spec names it."""
    folder = ROOT / "pdrop"
    for path in [path for name in ON_THE_WAY for path in [folder / name, *(folder / name).glob("*.py")]]:
        assert path.exists(), path
        for node in ast.walk(ast.parse(path.read_text() if path.is_file() else "")):
            named = getattr(node, "arg", None) == dial or getattr(node, "value", None) == dial
            assert not named, f"{path}:{node.lineno} passes {dial} on by name"
    stated = [name for name in ("run.yaml", "checkpoint.yaml") if f"\n{dial}:" in (ROOT / "conf" / name).read_text()]
    assert len(stated) == 1 and dial in {field.name for field in fields(RunSpec)}


def test_no_dial_is_called_as_a_folder_of_choices_is() -> None:
    """Hydra would take `dial=value` for a choice of a file, and refuse it."""
    cfg: Any = OmegaConf.load(ROOT / "conf" / "run.yaml")
    chosen = {name for entry in cfg.defaults if not isinstance(entry, str) for name in entry}
    chosen |= {"hydra"}  # its own node, and its own choices: launchers
    assert [name for name in cfg if name not in chosen and (ROOT / "conf" / str(name)).is_dir()] == []


def test_a_new_field_keeps_runs_apart() -> None:
    """Every field of a spec is compared in one way; what nobody has thought of keeps runs out of one table."""
    groups = (OF_MODEL, COMPARED, OWN_WAY, ASKED)
    assert sorted(name for group in groups for name in group) == sorted(one.name for one in fields(RunSpec))
    assert set(ASKED) >= {"limit", "batch_size", "dtype", "attn_implementation", "sdpa_kernel", "device", "protocol"}


def test_a_new_field_leaves_older_records_their_id() -> None:
    """A record from before a dial existed has no such field: at its default the dial is not hashed, else it is."""
    spec = replace(compose.settings(HERE).spec, **LATER)
    older = {name: value for name, value in asdict(spec).items() if name not in LATER}
    assert hashed(older) == spec.run_id
    for one in fields(RunSpec):
        if one.default is not MISSING and one.name not in ("code", "task_files", "format"):
            assert hashed(older | {one.name: one.default}) == spec.run_id, one.name
            assert hashed(older | {one.name: "another"}) != spec.run_id, one.name


@pytest.mark.parametrize("name", ["run", "train"])
def test_every_dial_has_one_value_in_conf(name: str) -> None:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    from pdrop.cli import train

    assert train.TrainConfig and compose.RunConfig  # known to Hydra from then on

    with initialize_config_dir(str(compose.CONF), version_base="1.3"):
        cfg = hydra_compose(name)
    assert OmegaConf.missing_keys(cfg) <= {"train.data"}, "what only the user can say"


def test_python_turns_the_same_dials() -> None:
    settings = compose.settings(HERE | {"method": "fastv", "ratio": 0.25, "limit": 3, "model.batch_size": 5})
    spec = settings.spec
    assert (spec.method, spec.schedule, spec.limit, spec.batch_size) == ("fastv", "2:0.25", 3, 5)
    assert settings.schedule == Schedule.parse("2:0.25") and settings.source.layers == 12
    assert spec.max_new_tokens == 16 and spec.prompt == "chat" and spec.tasks == ("embedded_chart",)
    assert settings.folder == Path("results/runs") / spec.folder
    twin = compose.settings(HERE | {"method": "fastv", "twin": True, "seed": 7}).spec
    assert twin.method == "random_fastv" and twin.seed == 7
    assert compose.settings(HERE | {"method": "none", "ratio": 0.3, "seed": 7}).spec.seed == 0


@pytest.mark.parametrize(
    ("dials", "told"),
    [
        ({"limit": 0}, "limit is a whole number from 1 on, or null, not 0"),
        ({"batch_size": 0}, "^batch_size is a whole number from 1 on, not 0"),
        ({"model.batch_size": -1}, "model.batch_size is a whole number from 1 on, not -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is a whole number from 1 on, not 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is a whole number, not 2.5"),
        ({"dtype": "float7"}, "^dtype is float32, bfloat16, float16 or float64, not 'float7'"),
        ({"model.prompt": "vicuna"}, "model.prompt is chat, vicuna_v1 or qwen_1_5, not 'vicuna'"),
        ({"model.image_mode": "stretch"}, "model.image_mode is crop or pad, not 'stretch'"),
        ({"model.weights": "architecture"}, "model.weights is pretrained or random, not 'architecture'"),
        ({"model.path": "/no/where"}, "/no/where"),
        ({"ratoi": 0.5}, "there is no dial 'ratoi'"),
        ({"model": "lava"}, "unknown model 'lava': choose embedded"),
        ({"layers": 3}, "layers is a list such as layers=.8,16,24., not 3"),
        ({"results": ""}, "results is the folder of the store; it is empty here"),
        ({"latency.pairs": 2.5}, "^latency.pairs is a whole number, not 2.5"),
        ({"latency.memory": "maybe"}, "^latency.memory is true or false, not 'maybe'"),
        ({"latency.new_tokens": 2}, "^latency.new_tokens is a list such as latency.new_tokens=.1,2., not 2"),
        ({"force": "maybe"}, "force is true or false, not 'maybe'"),
        ({"model": "folder"}, "model.name"),
        ({"seed": -1}, "seed is a whole number from 0 to 4294967295, not -1"),
        ({"seed": 2**32}, "seed is a whole number from 0 to 4294967295"),
        ({"model.text_tokens": -99}, "model.text_tokens is a whole number from 0 on, or null, not -99"),
        ({"model.visual_tokens": 0}, "model.visual_tokens is a whole number from 1 on, or null, not 0"),
        ({"device": ""}, "device is cpu, cuda or mps, or null, not ''"),
        ({"model.path": " "}, "model.path is a folder"),
        ({"model.revision": ""}, "model.revision is a branch"),
        ({"attn_implementation": "foo"}, "attn_implementation is sdpa, eager or flash_attention_2, not 'foo'"),
        ({"tasks": 3}, "tasks is a set, a task, or a list of them"),
        ({"tasks": [["a"]]}, "tasks is a set, a task, or a list of them"),
        ({"latency._target_": "builtins.dict"}, "latency._target_=builtins.dict is not .*TimingProtocol"),
        ({"latency.warmup": "x"}, "latency.warmup is a whole number, not 'x'"),
        ({"latency.new_tokens": ["a"]}, "latency.new_tokens is a list such as"),
        ({"method": "sparsevlm", "method.recycle": "x"}, "method.recycle is a number, not 'x'"),
        ({"method": "random", "method.seed": "x"}, "seed is a whole number, not 'x'"),
    ],
)
def test_what_a_dial_cannot_be_is_one_line(dials: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        compose.settings(HERE | dials)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("node", "told"),
    [
        ({"_target_": "builtins.dict"}, "method._target_=builtins.dict is not a pdrop.methods.base.Method"),
        ({"_target_": "nowhere.No"}, "method._target_=nowhere.No cannot be imported: No module named"),
        ({"_target_": "pdrop.schedule.pyramid"}, "missing 1 required positional argument"),
        ({"_target_": "pdrop.methods.fastv.FastV", "seed": 1}, "unexpected keyword argument 'seed'"),
        ({"positions": "compact"}, "method needs a _target_"),
    ],
)
def test_what_is_no_method_is_one_line(node: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        compose.instantiate(node, "method", Method)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: attach(None, FastV(), Schedule.parse("2:0.5")),
        lambda model: attach(model, FastV, Schedule.parse("2:0.5")),
        lambda model: attach(model, FastV(), "2:0.5"),
        lambda model: solve(FastV, "keep:0.5", num_layers=4, visual_tokens=4),
        lambda model: solve("fastv", "keep:0.5", num_layers=4, visual_tokens=4),
        lambda model: solve(FastV(), 0.5, num_layers=4, visual_tokens=4),
        lambda model: solve(FastV(), "keep:0.5", num_layers=None, visual_tokens=4),
        lambda model: pyramid("x"),
        lambda model: pyramid(12, layers=3),
        lambda model: pyramid(12, layers="36"),
        lambda model: single(2, 0.5, layers=3),
        lambda model: Schedule("2:0.5"),
        lambda model: Schedule((2, 0.5)),
        lambda model: Schedule(None),
        lambda model: Schedule.parse(3),
        lambda model: RandomDrop(seed="x"),
    ],
)
def test_wrong_arguments_of_the_python_calls_are_value_errors(call: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match=r"^(model|method|schedule|budget|num_layers|layers|seed) is .*, not "):
        call(torch.nn.Linear(1, 1))
