"""What identifies a run: an edit of what makes its numbers makes another run of it, any other edit does not."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from pathlib import Path

import pytest

from pdrop import identity
from pdrop.cli import compose
from pdrop.identity import NUMBERS, PACKAGE, TRAINED, code_digest, imported, sources
from pdrop.record import RunRecord

ROOT = Path(__file__).resolve().parents[2]
# run.py's words: without and with dropping, a method by inheritance, a twin
RUNS = {
    "none": {"method": "none"},
    "pyramiddrop": {"method": "pyramiddrop"},
    "fastv": {"method": "fastv"},
    "plus": {"method": "sparsevlm_plus"},
    "twin": {"method": "fastv", "twin": True},
}
# what makes no numbers: texts, doors, what finds a schedule (which identifies a run itself), what keeps files
IDLE = (
    *("__init__.py", "__main__.py", "cli", "training", "conformance", "embedded", "methods/__init__.py"),
    *("names.py", "pace.py", "garbage.py", "store.py", "leases.py", "samples.py", "thumbnails.py"),
    *("announcements.py", "command_help.py", "commands.py", "environment.py", "identity.py"),
    *(
        "runs/__init__.py",
        "runs/run.py",
        "runs/rescore.py",
        "runs/settings.py",
        "runs/calibration.py",
        "runs/cards.py",
        "runs/cluster.py",
        "runs/device.py",
        "runs/fleet.py",
        "runs/plan.py",
        "runs/remembered.py",
        "runs/workers.py",
        "runs/worker_dials.py",
    ),
    *("cost/__init__.py", "cost/breakdown.py", "cost/budget.py", "cost/counters.py", "cost/training.py"),
)
# doors to what is not measured, or not by these lines: texts that a run prints, files that it writes, its settings
BESIDE = {
    "pace.py",
    "environment.py",
    "runs/workers.py",
    "cost/breakdown.py",
    "runs/settings.py",
    "store.py",
    "samples.py",
    "thumbnails.py",
    "names.py",
    "cost/training.py",
}
# what the package's doors import is what their names stand for
BESIDE |= {"__init__.py", "methods/__init__.py", "runs/__init__.py", "cost/__init__.py"}


@pytest.fixture
def edit(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Edit sources as digests read them: `edit(path, ..., text=...)` puts the text at the end of each."""
    texts: dict[Path, str] = {}
    real = {name: getattr(identity, name) for name in ("text_of", "_meaning", "_modules")}

    def read_anew(name: str) -> Callable[..., object]:
        return lambda path, *more: (real[name].__wrapped__ if path in texts else real[name])(path, *more)

    def call(*paths: Path, text: str) -> None:
        assert all(path.is_file() for path in paths)
        texts.clear()
        texts.update(dict.fromkeys(paths, text))
        identity._digest.cache_clear()

    monkeypatch.setattr(identity, "text_of", lambda path: real["text_of"](path) + texts.get(path, ""))
    for name in ("_meaning", "_modules"):
        monkeypatch.setattr(identity, name, read_anew(name))
    yield call
    identity._digest.cache_clear()


def run_ids(names: Collection[str] = RUNS) -> dict[str, str]:
    """Of some of RUNS, from the sources as they are read."""
    dials = {"tasks": ["embedded_chart"], "device": "cpu"}
    return {name: compose.settings(dials | RUNS[name]).spec.run_id for name in names}


def test_an_edit_of_what_makes_no_numbers_changes_no_run(before: dict[str, str], edit: Callable[..., None]) -> None:
    paths = ["pdrop/cli/run.py", "pdrop/cli/train.py", "pdrop/cli/compose.py", "pdrop/runs/run.py"]
    paths += ["pdrop/training/loop.py", "pdrop/cost/breakdown.py", "pdrop/cost/budget.py", "pdrop/conformance/suite.py"]
    paths += ["pdrop/embedded/scenes.py", "pdrop/methods/no_image.py", "analysis/tables/table.py", "run.py"]
    edit(*(ROOT / path for path in paths), text="\nEDITED = 1\n")
    assert run_ids() == before


def test_comments_and_layout_change_no_run(before: dict[str, str], edit: Callable[..., None]) -> None:
    paths = (PACKAGE / path for path in ("engine/hooks.py", "methods/fastv.py", "evaluation/lmms.py"))
    edit(*paths, text="\n\n# a comment\n")
    assert run_ids() == before


EVERY, SOME = set(RUNS), {"fastv"}


@pytest.fixture(scope="module")
def before() -> dict[str, str]:
    """Of the sources as they are."""
    return run_ids()


@pytest.mark.parametrize(
    ("path", "changed"),
    [
        ("engine/hooks.py", EVERY),
        # of these each run has the same digest: one run tells it
        *((path, SOME) for path in ("evaluation/lmms.py", "evaluation/generation.py")),
        *((path, SOME) for path in ("schedule.py", "shapes.py", "models/checkpoint.py", "models/source.py")),
        *((path, SOME) for path in ("cost/flops.py", "timing/paired.py", "runs/timed_prompt.py")),
        *((path, SOME) for path in ("runs/measured.py", "runs/timed.py")),
        ("methods/base.py", EVERY),
        ("methods/pyramiddrop.py", {"pyramiddrop"}),
        ("methods/fastv.py", {"fastv", "twin"}),
        ("methods/sparsevlm.py", {"plus"}),
        ("methods/sparsevlm_plus.py", {"plus"}),
        ("methods/random_drop.py", {"twin"}),
    ],
)
def test_an_edit_of_what_makes_numbers_changes_the_runs_that_it_makes(
    path: str, changed: set[str], before: dict[str, str], edit: Callable[..., None]
) -> None:
    edit(PACKAGE / path, text="\nEDITED = 1\n")
    after = run_ids(changed if changed == SOME else RUNS)
    assert {name for name in after if after[name] != before[name]} == changed


def test_what_a_method_file_imports_later_counts_too(edit: Callable[..., None]) -> None:
    files = [PACKAGE / "methods/fastv.py"]
    assert PACKAGE / "methods/sparsevlm_plus.py" not in sources(files)
    edit(files[0], text="\nfrom pdrop.methods import sparsevlm_plus\n")
    assert {PACKAGE / f"methods/sparsevlm{end}.py" for end in ("", "_plus")} <= set(sources(files))


def test_every_source_makes_numbers_or_is_known_not_to() -> None:
    """A new file is put on one of the two lists: nobody forgets to ask."""
    for name in (*TRAINED, *IDLE):
        assert (PACKAGE / name).exists(), f"{name} is gone: take it off the list"
    counted = set(sources()) | set((PACKAGE / identity.FOLLOWED).glob("*.py"))
    idle = {path for name in IDLE for path in [PACKAGE / name, *(PACKAGE / name).rglob("*.py")]}
    both = {path.relative_to(PACKAGE).as_posix() for path in sources() if path in idle}
    assert not both, f"{sorted(both)} are on both lists"
    unknown = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")} - {
        path.relative_to(PACKAGE).as_posix() for path in (counted | idle) if path.suffix == ".py"
    }
    assert not unknown, (
        f"{sorted(unknown)}: does a run's number follow from them? NUMBERS in pdrop/identity.py, or IDLE"
    )


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_what_makes_numbers_imports_nothing_else_that_does(path: Path) -> None:
    used = {other.relative_to(PACKAGE).as_posix() for other in imported(path) - set(sources())}
    assert used <= BESIDE, f"{sorted(used - BESIDE)} is imported where numbers are made, and not counted"


def test_a_method_of_ones_own_brings_what_it_is_made_of(tmp_path: Path) -> None:
    def digest(name: str, changed: str = "", text: str = "") -> str:
        """Of a copy elsewhere, with one file changed."""
        shutil.copytree(tmp_path / "here", tmp_path / name)
        if changed:
            (tmp_path / name / "mine" / changed).write_text(text)
        return code_digest([tmp_path / name / "mine/methods/combined.py"])

    package = tmp_path / "here" / "mine"
    (package / "methods").mkdir(parents=True)
    for name in ("__init__.py", "methods/__init__.py", "unused.py"):
        (package / name).write_text("")
    text = (
        "import json, torch\nfrom pdrop.methods.fastv import FastV\nfrom ..ranks import rank\nfrom mine import more\n"
    )
    (package / "methods/combined.py").write_text(text)
    (package / "ranks.py").write_text("def rank(): return 1\n")
    (package / "more.py").write_text("MORE = 1\n")
    found = set(sources([package / "methods/combined.py"])) - set(sources())
    assert {path.name for path in found} == {"__init__.py", "combined.py", "ranks.py", "more.py", "fastv.py"}
    before = code_digest([package / "methods/combined.py"])
    assert digest("a folder elsewhere") == before, "where it lies does not matter"
    assert digest("unused", "unused.py", "UNUSED = 1\n") == before
    assert digest("changed", "ranks.py", "def rank(): return 2\n") != before
    alone = tmp_path / "alone.py"
    alone.write_text("import beside\n")
    (tmp_path / "beside.py").write_text("")
    assert {path.name for path in set(sources([alone])) - set(sources())} == {"alone.py", "beside.py"}


def test_the_trainer_makes_the_weights_of_a_training_and_no_run(edit: Callable[..., None]) -> None:
    trained, measured = code_digest(parts=TRAINED), code_digest(parts=NUMBERS)
    edit(PACKAGE / "training/loop.py", text="\nEDITED = 1\n")
    assert code_digest(parts=TRAINED) != trained and code_digest(parts=NUMBERS) == measured


def test_records_of_older_code_are_still_read() -> None:
    """Their ids follow from what they say, not from the sources of today."""
    for path in sorted((ROOT / "results/reference/runs").glob("*/record.json"))[:5]:
        record = RunRecord.read(path.parent)
        assert record.spec.code != code_digest() and record.run_id in path.parent.name
