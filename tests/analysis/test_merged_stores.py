"""Two stores become one by copying their runs, questions and markers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from analysis.store.load import load_experiment, load_runs
from pdrop.samples import condense, read_samples
from tests.support.records import make_record, put


def test_runs_of_another_store_are_read_as_if_they_had_been_made_here(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    folders = {}
    for store, method in ((here, "none"), (there, "fastv")):
        folders[method] = put(store, make_record(method, 0.5))
        condense(folders[method])
    alone = read_samples(folders["fastv"], "toy_exist")
    shutil.copytree(there / "runs", here / "runs", dirs_exist_ok=True)
    moved = here / "runs" / folders["fastv"].name
    (here / "questions").rename(tmp_path / "aside")
    with pytest.raises(ValueError, match=r"its questions are missing .*copy them along with the run"):
        read_samples(moved, "toy_exist")
    (tmp_path / "aside").rename(here / "questions")
    for name in ("questions", "experiments"):
        shutil.copytree(there / name, here / name, dirs_exist_ok=True)
    assert read_samples(moved, "toy_exist") == alone
    assert {run.record.spec.method for run in load_runs(here)} == {"none", "fastv"}
    assert {run.record.spec.method for run in load_experiment(here, "demo").runs} == {"none", "fastv"}
