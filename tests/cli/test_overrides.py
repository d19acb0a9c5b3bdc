"""What Hydra would say in seven lines, or with a traceback, is one line; --cfg shows the first run of a sweep."""

import shutil
from pathlib import Path

import pytest

from pdrop.cli import run, train
from pdrop.cli.overrides import flags_first, misfit, shown
from tests.support.command_line import called

CONF = Path(__file__).resolve().parents[2] / "conf"
REFUSED = {
    "no override": (["x"], "'x' is not a dial: write name=value"),
    "an open bracket": (["tasks=["], "'tasks=.' is not a dial: write name=value"),
    "a word for a number": (["stages=x"], "stages is a whole number, not x"),
    "a fraction": (["limit=0.5"], "limit is a whole number, not 0.5"),
    "in a sweep": (["-m", "ratio=0.3,x"], "ratio is a number, not 'x'"),
    "first in a sweep": (["-m", "limit=x,1"], "limit is a whole number, not x"),
    "no list": (["task_folders=x"], "task_folders is a list such as"),
    "a list of words": (["layers=[a]"], "layers is a list such as layers=.8,16,24., not .a."),
    "a part that is not there": (["latency.paris=3"], "latency has no 'paris', did you mean pairs"),
    "a part of a method": (["method.foo=3", "method=fastv"], "method.foo=3: method has no 'foo'"),
    "a word for what has parts": (["schedule=single", "schedule.layers=[8]"], "schedule comes with the method"),
    "a part of the model": (["model.batchsize=3"], "did you mean batch_size"),
}


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_composed_is_one_line(arguments, words):
    told = misfit(arguments, CONF, "run")
    assert told is not None and "\n" not in told
    with pytest.raises(ValueError, match=words):
        raise ValueError(told)


def test_a_file_that_does_not_fit_is_one_line_too(tmp_path):
    """As after an update while a command runs: the files are of one version, the code in memory is of another."""
    conf = shutil.copytree(CONF, tmp_path / "conf")
    with (conf / "run.yaml").open("a") as file:
        file.write("of_tomorrow: 3\n")
    told = misfit(["ratio=0.3"], conf, "run") or ""
    assert "\n" not in told and told.startswith(f"{conf}/run.yaml cannot be composed (In 'run': ")
    assert "'of_tomorrow' not in 'RunDials'" in told and told.endswith("start again if pdrop was updated")


def test_trainings_are_looked_at_as_well():
    assert "train has no 'foo'" in (misfit(["train.foo=3"], CONF, "train") or "")
    assert misfit(["train.steps=3", "++train.args.x=1", "train=embedded"], CONF, "train") is None


def test_what_can_be_composed_passes():
    for arguments in (
        ["ratio=0.3"],
        ["-m", "ratio=0.3,0.5", "method=none,fastv"],
        ["-m", "experiments=demo"],
        ["ratio=0.3", "--cfg", "job"],
        ["method=sparsevlm", "method.recycle=0.2"],
        ["+method.foo=1"],  # its constructor decides
        ["-m", "stages=range(2,5)", "method=glob(fast*)"],
        ["--help"],
    ):
        assert misfit(arguments, CONF, "run") is None, arguments


def test_cfg_of_a_sweep_shows_its_first_run(monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert shown(["-m", "ratio=0.3,0.5"]) == ["-m", "ratio=0.3,0.5"], "nothing is changed where a sweep is run"
    code, said = called(run.main, "run.py", ("-m", "--cfg", "job", "ratio=0.3,0.5", "method=fastv"), monkeypatch, capfd)
    assert code == 0 and "ratio: 0.3" in said and "FastV" in said and "Traceback" not in said
    code, said = called(run.main, "run.py", ("-m", "experiments=demo", "--cfg", "job"), monkeypatch, capfd)
    assert code == 0 and "experiment: demo" in said


def test_a_training_is_refused_before_a_model_is_loaded(monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    for word, told in (
        ("device=cuda:5", "choose a GPU with CUDA_VISIBLE_DEVICES=5"),
        ("device=tpu", "unknown device 'tpu'"),
        ("device=", "unknown device ''"),
        ("seed=-1", "seed is a whole number from 0"),
        ("output=", "output is the folder of the trainings"),
        ("train.args.resume_from_checkpoint=/nope", "resumes from its own last checkpoint"),
    ):
        words = ("train=embedded", "train.data=none.json", word)
        code, said = called(train.main, "train.py", words, monkeypatch, capfd)
        assert code == 1 and told in said and said.count("\n") == 1, said


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["ratio=0.3,0.5"], "sweep over them with -m"),
        (["tasks=pope,mme"], "with -m, or give a list, tasks=[pope,mme]"),
        (["twin=5"], "twin is true or false, not 5"),
        (["-m", "force=0,1"], "force is true or false, not 0"),
        (["-m", "ratio=0.3,0.5", "twin=false,true", "plan=true"], None),
        (["experiments=demo", "ratio=0.3,0.5"], None),
    ],
)
def test_several_values_and_numbers_for_switches(given: list[str], told: str | None) -> None:
    found = misfit(given, CONF, "run")
    assert found is None if told is None else told in (found or ""), found
    assert str(misfit(["method=none,fastv"], CONF, "run")).endswith("sweep over them with -m"), "a method is one"


def test_help_composes_nothing_to_check_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hydra.compose", lambda *_, **__: pytest.fail("composed"))
    assert misfit(["--help"], CONF, "run") is None and misfit(["--cfg", "job"], CONF, "train") is None


@pytest.mark.parametrize(("door", "name"), [(run, "run"), (train, "train")])
@pytest.mark.parametrize("given", [("--help",), ("-m", "ratio=0.3,0.5", "method=fastv", "-h")])
def test_help_is_the_text_in_conf(door, name, given, monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("hydra._internal.hydra.Hydra.app_help", lambda *_, **__: pytest.fail("Hydra's is slow"))
    text = (CONF / f"{name}.yaml").read_text().partition("template: |\n")[2]
    code, said = called(door.main, f"{name}.py", given, monkeypatch, capfd)
    assert code == 0 and "${" not in said and not list(tmp_path.iterdir())
    for line in (line.strip() for line in text.splitlines()):
        assert "${" in line or line in said, line


def test_options_may_come_after_dials() -> None:
    given = ["limit=1", "-m", "method=fastv", "--cfg", "job", "ratio=0.5"]
    assert flags_first(given) == ["-m", "--cfg", "job", "limit=1", "method=fastv", "ratio=0.5"]
