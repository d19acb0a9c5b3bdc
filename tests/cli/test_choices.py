"""Choices that cannot be had: one line with the nearest names, for every group, before anything is composed."""

from pathlib import Path

import pytest

from pdrop.cli import run
from pdrop.cli.choices import complaint, hint
from tests.support.command_line import called

CONF = Path(__file__).resolve().parents[2] / "conf"
NO_CHOICES = (".", "task_sets", "protocols")
GROUPS = sorted({path.parent.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml")} - set(NO_CHOICES))

REFUSED = {
    "a misspelt experiment": (["experiments=demoo"], "unknown experiments 'demoo', did you mean demo"),
    "one of several": (["-m", "experiments=demo,demoo"], "'demoo', did you mean demo"),
    "in a sweep": (["-m", "method=none,fastw"], "unknown method 'fastw', did you mean fastv?"),
    "in a function": (["-m", "method=choice(none,fastw)"], "unknown method 'fastw', did you mean fastv?"),
    "a pattern that fits nothing": (["-m", "method=glob(zz*)"], "fits no method"),
    "a path": (["method=../method/fastv"], "unknown method '../method/fastv', did you mean fastv"),
    "a file": (["method=fastv.yaml"], "did you mean fastv"),
    "twice": (["method=none", "method=fastv"], "method is given twice, method=none and method=fastv"),
    "two at once": (["experiments=[demo,ratio]"], r"unknown experiments \['demo', 'ratio'\]"),
    "nothing": (["method="], "unknown method ''"),
    "null": (["experiments=null"], "unknown experiments None"),
    "taken away": (["~method"], "a method is chosen by method=NAME alone"),
    "added": (["+method=fastv"], "a method is chosen by method=NAME alone"),
    "put elsewhere": (["model@x=embedded"], "a model is chosen by model=NAME alone"),
    "a checkpoint": (["model=/where/it/is"], "a checkpoint of your own is model=folder model.path=/where/it/is "),
    "a launcher": (["hydra/launcher=basick"], "unknown hydra/launcher 'basick', did you mean basic?"),
}


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_chosen_is_one_line(arguments, words):
    told = complaint(arguments, CONF)
    assert told is not None and "\n" not in told
    with pytest.raises(ValueError, match=words):
        raise ValueError(told)


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_names_the_nearest_and_takes_its_own(group):
    names = [path.stem for path in (CONF / group).glob("*.yaml")]
    assert complaint([f"{group}={names[0]}"], CONF) is None
    for name in names:
        assert f"unknown {group} '{name}x', did you mean {name}" in (complaint([f"{group}={name}x"], CONF) or "")


def test_what_is_no_choice_passes():
    for arguments in (["ratio=0.3,0.5"], ["layers=[2,4]"], ["-m", "method=glob(fast*)"], ["'method=fastv'"], ["x"]):
        assert complaint(arguments, CONF) is None, arguments


def test_folders_of_ones_own_are_looked_through(tmp_path):
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text((CONF / "method" / "fastv.yaml").read_text())
    (tmp_path / "experiments").mkdir()
    study = tmp_path / "experiments" / "study.yaml"
    study.write_text("hydra:\n  sweeper:\n    params:\n      method: none,mine\n")
    assert "unknown method 'mine'" in (complaint(["method=mine"], CONF) or "")
    for told in (["--config-dir", str(tmp_path)], [f"-cd={tmp_path}"], [f"hydra.searchpath=[file://{tmp_path}]"]):
        assert complaint([*told, "method=mine"], CONF) is None, told
        assert complaint([*told, "experiments=study"], CONF) is None, told
    study.write_text("hydra:\n  sweeper:\n    params:\n      method: none,mime\n")
    told = complaint(["-m", "experiments=study", "--config-dir", str(tmp_path)], CONF)
    assert told is not None and told.startswith(f"{study}: unknown method 'mime', did you mean mine")


def test_experiment_for_experiments_gets_a_hint():
    assert "experiments=demo runs what its file says" in (hint(["experiment=demo"], CONF) or "")
    assert hint(["experiment=mine"], CONF) is None
    assert hint(["experiments=demo", "experiment=demo"], CONF) is None


def test_both_commands_ask(tmp_path, monkeypatch, capfd):
    from pdrop.cli import train

    monkeypatch.chdir(tmp_path)
    for main, words in ((run.main, ("-m", "experiments=demoo")), (train.main, ("train=embeded",))):
        code, said = called(main, "x.py", words, monkeypatch, capfd)
        assert code == 1 and said.count("\n") == 1 and "did you mean" in said
    code, said = called(run.main, "run.py", ("tasks=embeded",), monkeypatch, capfd)
    assert code == 1 and "unknown task 'embeded' (did you mean embedded" in said
    code, said = called(run.main, "run.py", ("tasks=5",), monkeypatch, capfd)
    assert code == 1 and "tasks is a set, a task, or a list of them" in said
    assert not list(tmp_path.glob("results*"))
