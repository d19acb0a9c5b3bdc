"""The README tells the truth: its commands compose, its recipe works to the letter, its tree is the tree."""

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from records import make_record, put, standard, table_of

from analysis.__main__ import main
from analysis.report import readme
from analysis.style import task_names
from analysis.tables.table import signed
from pdrop.compose import CONF
from pdrop.run import check_dials

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
LINES = README.replace("\\\n", "").splitlines()  # a backslash at its end joins a line to the next
COMMANDS = [line.split("#")[0].strip() for line in LINES if line.startswith("python run.py")]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_run_command_composes(command):
    from hydra import compose, initialize_config_dir

    arguments = [a for a in shlex.split(command)[2:] if a != "-m"]
    assert check_dials(arguments) is None
    single = [re.split(r",(?![^\[]*\])", a)[0] for a in arguments]  # the first value of each sweep
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert compose("run", single).model.name


TRAININGS = [line.split("train.py", 1)[1] for line in LINES if " train.py " in line]


@pytest.mark.parametrize("command", [line for line in TRAININGS if "=" in line])
def test_every_training_command_composes(command):
    from hydra import compose, initialize_config_dir

    from pdrop import train

    arguments = [a for a in shlex.split(command.split("#")[0]) if a != "-m"]
    assert check_dials(arguments, [f.name for f in fields(train.TrainConfig)]) is None
    single = [a.split(",")[0] for a in arguments]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert compose("train", single).train.data.endswith(".json")


def test_every_target_named_is_in_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README + (ROOT / "CHANGELOG.md").read_text(), re.M))
    assert {"demo", "test", "help"} <= named <= targets


def test_the_tree_names_every_file_of_the_package():
    tree = README.split("## What is where")[1].split("```")[1]
    for path in [*ROOT.glob("*.py"), *(ROOT / "pdrop").glob("*")]:
        if path.name not in ("__pycache__",) and not path.name.endswith(".egg-info"):
            assert path.name in tree, f"README's tree does not name {path.name}"


@pytest.mark.slow
def test_the_recipe_for_a_method_works_to_the_letter(tmp_path):
    for name in ("pdrop", "conf", "experiments", "run.py"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path / name)
    recipe = README.split("## Add a method")[1]
    blocks = re.findall(r"`([\w/.]+)`:\n\n```\w+\n(.*?)```", recipe, re.S)
    assert [name for name, _ in blocks] == ["pdrop/methods/central.py", "conf/method/central.yaml"]
    for name, text in blocks:
        assert not (tmp_path / name).exists()
        (tmp_path / name).write_text(text)
    command = [sys.executable, "run.py", "method=central", "tasks=embedded_chart", "limit=2", "latency=off"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"done +central +\[2:0.5\]", done.stdout)


def test_the_numbers_shown_are_those_of_the_records():
    renewed = readme.written(ROOT / "README.md", ROOT / "results/reference")
    assert renewed == README, "python -m analysis readme --results results/reference"
    shown = README.split(readme.START)[1].split(readme.END)[0]
    table = re.search(r"\| budget .*?\n\n", shown, re.S)
    assert table and table[0].count("\n") > 10
    assert table[0] in (ROOT / "results/reference/tables/demo.md").read_text(), "make reference"
    for image in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / image).is_file(), image


def test_what_is_said_follows_the_records(tmp_path):
    store = standard(tmp_path / "results")
    put(store, make_record("pyramiddrop", 0.5), experiment="positions")
    put(store, make_record("pyramiddrop", 0.5, positions="original"), experiment="positions")
    put(store, make_record("none", 1.0), experiment="positions")
    page = tmp_path / "README.md"
    page.write_text(f"before {readme.START} old {readme.END} after")
    assert main(["readme", "--results", str(store), "--readme", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before ") and text.endswith(" after") and " old " not in text
    said = " ".join(text.split())
    demo = table_of(store)
    (best,) = (r for r in demo.rows if r.spec.method == "pyramiddrop" and r.budget == "0.5")
    assert f"PyramidDrop {signed(best.against_random)} at 0.5" in said
    assert "Of 2 rankings in the table above that have a random twin there, 2 beat it and 0 lose" in said
    assert f"changes the average by {signed(best.average.delta)}, with original" in said
    assert "**Position ids.**" in said, "the same scores: nothing costs"
    lost, same = said.split("PyramidDrop takes ")[1].split(" - **")[0].split(" Not told apart from none: ")
    for task, cell in best.cells.items():
        change = cell.delta
        assert change is not None
        shown = f'"{task_names(list(demo.tasks))[task]}"'
        assert (shown in lost) == (change.sign < 0) and (shown in same) == (not change.clear), task
    assert "results/tables/demo.md" in said and "layer" not in said.split("What this model shows")[1]
    page.write_text("no place")
    assert main(["readme", "--results", str(store), "--readme", str(page)]) == 1
