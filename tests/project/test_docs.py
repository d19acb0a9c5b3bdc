"""The README and docs/ tell the truth: commands compose, code runs and prints what is shown, links lead somewhere."""

import doctest
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from analysis.__main__ import main, parse
from pdrop.cli import rescore
from pdrop.cli.compose import CONF
from pdrop.cli.overrides import misfit
from pdrop.cli.run import check_dials
from pdrop.record import read_records
from pdrop.samples import read_samples
from tests.support.records import TASKS, make_record, put

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^ *(?:`(?P<file>[\w/.]+)`:\n\n *)?```(?P<kind>\w+)\n(?P<text>.*?)^ *```$", re.M | re.S)
DROPPING = "docs/add_a_method.md"
RECIPE = "docs/my_model.md"


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `file` is the name in the line above it, where it is to be saved."""

    page: str
    line: int
    file: str | None
    kind: str
    text: str


def blocks(path: Path) -> Iterator[Block]:
    text = path.read_text()
    for found in BLOCK.finditer(text):
        line = text[: found.start("text")].count("\n") + 1
        yield Block(path.relative_to(ROOT).as_posix(), line, found["file"], found["kind"], found["text"])


BLOCKS = [block for page in PAGES for block in blocks(page)]
FILES = {(block.page, block.file): block.text for block in BLOCKS if block.file}


def command_lines() -> Iterator[str]:
    """What pages tell the reader to type; a backslash at its end joins a line to the next."""
    for block in BLOCKS:
        if block.kind == "console":
            for line in block.text.replace("\\\n", "").splitlines():
                if command := re.split(r"(?:^| +)# ", line)[0].strip():
                    yield " ".join(command.split())


COMMANDS = sorted(set(command_lines()))


def those(*starts: str) -> list[str]:
    return [command for command in COMMANDS if command.startswith(starts)]


def test_no_command_escapes():
    known = ("python run.py", "python train.py", "torchrun ", "python -m analysis ", "python -m pdrop", "make ")
    known += ("python -m benchmarks.first_checks",)
    outside = ("python -m lmms_eval --model pdrop ", "cp ", "git ", "pre-commit ", "pytest ", "ruff ", "source ")
    assert [command for command in COMMANDS if not command.startswith(known + outside)] == []
    assert len(those("python run.py")) > 10 and those("python train.py") and those("python -m analysis ")


@pytest.mark.parametrize("command", those("python -m pdrop rescore"))
def test_commands_of_scoring_anew_are_understood(command):
    assert rescore.parse(command.split()[4:]).check in (True, False)


@pytest.fixture(scope="module")
def conf(tmp_path_factory):
    """The configuration, with the choices that pages add."""
    folder = tmp_path_factory.mktemp("pages") / "conf"
    shutil.copytree(CONF, folder, symlinks=False)
    for (page, name), text in FILES.items():
        if name.startswith(("conf/", "experiments/")):
            new = folder.parent / name if name.startswith("conf/") else folder / name
            assert page == DROPPING or not new.exists(), f"{name} is there already"
            new.write_text(text)
    return folder


def first_of_each(arguments: list[str]) -> list[str]:
    """The first job of a sweep; "-m" and the like are Hydra's own."""
    return [re.split(r",(?![^\[]*\])", a)[0] for a in arguments if not a.startswith("-")]


@pytest.mark.parametrize("command", those("python run.py"))
def test_every_run_command_composes(command, conf):
    arguments = shlex.split(command)[2:]
    assert check_dials([a for a in arguments if a != "-m"]) is None
    with initialize_config_dir(str(conf), version_base="1.3"):
        assert compose("run", first_of_each(arguments)).model.name


@pytest.mark.parametrize("command", those("python train.py", "torchrun "))
def test_every_training_command_composes(command, conf):
    from pdrop.cli import train

    arguments = [a for a in shlex.split(command.split("train.py", 1)[1]) if a != "-m"]
    assert check_dials(arguments, [f.name for f in fields(train.TrainConfig)]) is None
    with initialize_config_dir(str(conf), version_base="1.3"):
        assert compose("train", first_of_each(arguments)).train.data.endswith(".json")


@pytest.mark.parametrize("command", those("python -m analysis "))
def test_every_analysis_command_is_understood(command):
    assert parse(shlex.split(command)[3:], None).command


def test_every_word_after_pdrop_is_understood():
    """Words of its own (fetch, rescore), or run.py's."""
    found = those("python -m pdrop ")
    assert {shlex.split(command)[3] for command in found} == {"fetch", "rescore"}
    for command in those("python -m pdrop fetch "):
        assert misfit(shlex.split(command)[4:], CONF, "run") is None


def test_every_module_that_is_called_is_there():
    for command in those("python -m pdrop."):
        assert import_module(shlex.split(command)[2]), command


def test_every_target_named_is_in_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    texts = [page.read_text() for page in (*PAGES, ROOT / "CHANGELOG.md")]
    named = {name for text in texts for name in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.M)}
    assert {"demo", "test", "help", "docs"} <= named <= targets


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, heading = target.partition("#")
        if not path.startswith(("http:", "https:")):
            there = page.parent / path if path else page
            assert there.exists(), f"{page.name} links to {target}"
            if heading:
                heads = re.findall(r"^#+ (.+)$", there.read_text(), re.M)
                assert heading in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, target


RUN = {page: list(group) for page, group in itertools.groupby(BLOCKS, key=lambda block: block.page)}
RUN = {page: [b for b in group if b.kind in ("python", "pycon") and not b.file] for page, group in RUN.items()}


@pytest.mark.parametrize("page", [page for page, code in RUN.items() if code])
def test_code_runs_and_prints_what_is_shown(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    names: dict = {"__name__": "__main__"}
    checker = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE, verbose=False)
    for block in RUN[page]:
        if block.kind == "python":
            exec(compile("\n" * (block.line - 1) + block.text, page, "exec"), names)
            continue
        case = doctest.DocTestParser().get_doctest(block.text, names, page, page, block.line - 1)
        assert case.examples, f"{page}:{block.line}"
        said: list[str] = []
        checker.run(case, out=said.append, clear_globs=False)
        assert not checker.failures, "".join(said)
        names.update(case.globs)


def test_the_worked_example_is_the_projects_own():
    """So it conforms and equals the official program, as every method does: tests/conformance, tests/methods."""
    for (page, name), text in FILES.items():
        if page == DROPPING:
            assert text == (ROOT / name).read_text(), f"{page} shows another {name}"


def test_stores_merge_as_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here, other = Path("results"), Path("other/results")
    put(here, make_record("none", 1.0), experiment="demo")
    put(here, make_record("fastv", 0.5), experiment="demo")
    put(other, make_record("none", 1.0), experiment="demo")
    put(other, make_record("pyramiddrop", 0.5), experiment="demo")
    alone = put(other, make_record("fastv", 0.3), n=40, experiment=None)  # was asked less: questions of its own
    for store in (here, other):
        assert main(["condense", "--results", str(store)]) == 0
    (script,) = [b.text for b in BLOCKS if b.page == "docs/stores.md" and b.kind == "console"]
    lines = [line.strip() for line in script.splitlines()]
    subprocess.run(["bash", "-c", "; ".join(line for line in lines if line.startswith("cp "))], check=True)
    shutil.rmtree("other")
    assert len(read_samples(here / "runs" / alone.name, TASKS[0])) == 40
    for line in lines:
        if line.startswith("python -m analysis "):
            assert main(shlex.split(line)[3:]) == 0
    table = Path("results/tables/demo.md").read_text()
    assert "FastV" in table and "PyramidDrop" in table and len(list(read_records(here / "runs"))) == 4


@pytest.mark.exhaustive
@pytest.mark.slow
def test_my_model_my_tasks_and_my_method_to_the_letter(tmp_path):
    for name in ("pdrop", "conf", "experiments", "analysis", "run.py"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path / name)
    shipped = tmp_path / "pdrop/embedded"
    for (page, name), text in FILES.items():
        if page in (DROPPING, RECIPE):
            assert page == DROPPING or not (tmp_path / name).exists()
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text.replace("/data/questions.parquet", str(shipped / "data/test.parquet")))
    (script,) = [b.text for b in BLOCKS if b.page == RECIPE and b.kind == "console"]
    script = script.replace("/checkpoints/mine", str(shipped / "model")).replace("python ", f"{sys.executable} ")
    script = script.replace("method=none,pyramiddrop,fastv", "method=none,fastv,divprune limit=3 latency=off")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    records = list(read_records(tmp_path / "results/runs"))
    wanted = {"none", "fastv", "random_fastv", "divprune", "random_divprune"}
    assert {record.spec.method for record in records if record.status == "done"} == wanted
    assert {record.spec.model for record in records} == {"mine"}
    table = (tmp_path / "results/tables/mine.tex").read_text()
    assert all(word in table for word in ("FastV", "DivPrune", "\\toprule"))
    assert list((tmp_path / "results/figures").glob("mine-tradeoff.*"))
