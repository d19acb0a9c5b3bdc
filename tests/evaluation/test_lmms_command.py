"""lmms-eval's own command line means what the same words mean to run.py.

pytest tests/evaluation/test_lmms_command.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pdrop.cli.compose import CONF, choices, choose, instantiate
from pdrop.cli.compose import compose as composed
from pdrop.cli.lmms_command import from_arguments, in_own_words
from pdrop.evaluation.answers import Question
from pdrop.methods.fastv import FastV
from pdrop.methods.pyramiddrop import PyramidDrop
from pdrop.methods.random_drop import twin_of
from pdrop.methods.sparsevlm import SparseVLM
from pdrop.schedule import Schedule
from tests.support.saved_checkpoints import save_llava

GIVEN: list[dict[str, Any]] = [
    {},
    {"ratio": 0.3, "stages": 3, "seed": 4},
    {"ratio": 1.0, "positions": "original", "seed": 1},
    {"positions": "compact"},
    {"layers": [2], "ratio": 0.25},
    {"layers": [2, 8, 16], "ratio": 0.3},
]


def outcome(make: Any) -> Any:
    """What comes out, or that it is refused: FastV takes no three layers."""
    try:
        return make()
    except ValueError:
        return ValueError


def of_run(name: str, given: dict[str, Any]) -> Any:
    """What run.py makes of the same words."""
    words = [f"{dial}={value}".replace(" ", "") for dial, value in given.items()]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config: Any = OmegaConf.to_object(compose("run", [f"method={name}", *words]))
    if config.positions is not None and config.method is not None:
        config.method["positions"] = config.positions
    method = None if config.method is None else instantiate(config.method)
    return method, instantiate(config.schedule, num_layers=32)


def of_command(name: str, given: dict[str, Any]) -> Any:
    method, schedule = choose(name, given)
    return method, schedule(32)


@pytest.mark.product(3)
@pytest.mark.parametrize("name", choices("method"))
def test_every_method_is_run_pys(name: str) -> None:
    for given in GIVEN:
        expected = outcome(lambda: of_run(name, given))  # noqa: B023
        assert outcome(lambda: of_command(name, given)) == expected, given  # noqa: B023
    refused = outcome(lambda: of_run(name, {})) is ValueError
    assert refused == (name == "cdpruner"), "it alone asks for a folder"


def test_the_default_method_and_the_choices_are_run_pys() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        chosen = compose("run", return_hydra_config=True).hydra.runtime.choices["method"]
    assert composed({})[1] == chosen
    with pytest.raises(ValueError, match=f"unknown method 'x': choose {', '.join(choices('method'))}$"):
        choose("x", {})


def test_parts_of_a_file_can_be_set() -> None:
    method, schedule = choose("sparsevlm", {"schedule.budget": 128, "positions": "original"})
    assert isinstance(method, SparseVLM) and method.positions == "original"
    assert str(schedule(32)) == "3:303t 7:110t 16:36t"
    with pytest.raises(ValueError, match=r"there is no schedule\.bugdet: sparsevlm\.yaml has ratio, budget, layers"):
        choose("sparsevlm", {"schedule.bugdet": 128})
    with pytest.raises(ValueError, match=r"there is no method\.seed: none\.yaml has nothing to set"):
        choose("none", {"method.seed": 1})


def test_a_file_may_use_all_of_hydras_language(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDROP_TEST_LAYER", "5")
    _, schedule = choose("fastv", {"schedule.layer": "${oc.decode:${oc.env:PDROP_TEST_LAYER}}"})
    assert schedule(32) == Schedule.parse("5:0.5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_llava(tmp_path_factory.mktemp("command") / "llava"))


def test_arguments_as_lmms_eval_parses_them(folder: str) -> None:
    from lmms_eval.utils import simple_parse_args_string

    def respond(text: str) -> Any:
        config: dict[str, Any] = {"batch_size": 1, "device": "cpu"}  # what lmms-eval adds
        return from_arguments(**simple_parse_args_string(f"pretrained={folder},{text}"), **config)

    fastv = respond("method=fastv,ratio=0.5")
    assert (fastv.method, fastv.schedule) == (FastV(), Schedule.parse("2:0.5"))
    random = respond("method=random,seed=3,layers=[1,3],ratio=1,positions=null")
    assert (random.method, random.spec.seed) == (twin_of(PyramidDrop(), 3), 3)
    assert random.schedule == Schedule.parse("1:1 3:1")
    assert respond("method=random_fastv,seed=5").method == twin_of(FastV(), 5)
    none = respond("method=none,prompt=vicuna_v1,image_mode=pad,max_new_tokens=5,dtype=bfloat16")
    assert none.method is None and not none.schedule and none.spec.max_new_tokens == 5
    assert (none.builder.style, none.builder.image_mode) == ("vicuna_v1", "pad")
    assert none.model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"methd": "fastv"},
            r"unknown methd; there are pretrained, method, stages, ratio, layers, positions, twin, seed",
        ),
        (
            {"method": "random_drop"},
            r"unknown method 'random_drop': choose cdpruner, ",
        ),
        ({"layers": 8}, r"layers is a list such as layers=\[8,16,24\], not 8"),
        ({"stages": 2.5}, "stages is a whole number, not 2.5"),
        ({"seed": "x"}, "seed is a whole number, not 'x'"),
        ({"ratio": 1.2}, "between 0 and 1, not 1.2"),
        ({"ratio": float("nan")}, "between 0 and 1, not nan"),
        ({"method": "fastv", "positions": "somewhere"}, "positions"),
        ({"stages": 40}, "40 stages do not fit into 4 layers"),
    ],
)
def test_wrong_arguments(folder: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_arguments(folder, device="cpu", **arguments)


def test_questions_are_put_as_run_py_puts_them() -> None:
    def question(task: str, **arguments: Any) -> Question:
        return Question(task, 0, 0, "the left cup", list, arguments)

    box, plain = question("refcoco_rec_testA"), question("mme", until=["\n\n"], max_new_tokens=4)
    asked = in_own_words([box, plain], "qwen2_5_vl")
    assert asked[0].text == "Locate the left cup in this image and output the bbox coordinates in JSON format."
    assert asked[1].text == "the left cup" and asked[1].arguments == {"max_new_tokens": 4}, "cut nowhere"
    assert question("mme", until=["."]).arguments == in_own_words([question("mme", until=["."])], "llava")[0].arguments
    with pytest.raises(ValueError, match="task refcoco_rec_testA: how a llava_next model is asked for a box"):
        in_own_words([box], "llava_next")


def test_the_device_is_cuda_where_there_is_one(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="device=cuda cannot be had"):
        from_arguments(folder)
