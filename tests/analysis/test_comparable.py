"""Which runs share a table: superseded runs, several models, several settings of the whole store, budgets.

python -m pytest tests/analysis/test_comparable.py
"""

from __future__ import annotations

import csv
import io
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from analysis.__main__ import main
from analysis.comparison.comparable import parts, refuse_mixtures
from analysis.store.load import load_experiment, load_runs
from pdrop.record import RunRecord
from pdrop.schedule import Schedule, pyramid, single
from tests.support.records import fill, grid, make_record, put, standard, table_of

METHODS = ("none", "pyramiddrop", "fastv", "random")


def later(record: RunRecord, **changes: Any) -> RunRecord:
    """The same cell, made again a day later after something changed."""
    return replace(record, spec=replace(record.spec, **changes), started_at="2026-01-03T03:04:05Z")


@pytest.mark.parametrize(
    "change",
    [
        {"model_fingerprint": "e" * 64},
        {"versions": '{"torch":"2.16.0"}'},
        {"code": "new"},
        {"task_files": "new"},
        {"model_fingerprint": "e" * 64, "versions": "{}", "code": "new"},
    ],
)
def test_the_newest_of_a_cell_counts(tmp_path: Path, change: dict[str, str], capsys: Any) -> None:
    for method in METHODS:
        put(tmp_path, make_record(method, 0.5))
        put(tmp_path, later(make_record(method, 0.5), **change))
    assert main(["tables", "--results", str(tmp_path)]) == 0
    table = table_of(tmp_path)
    assert len(table.rows) == len(METHODS) and all(len(row.runs) == 1 for row in table.rows)
    assert all(getattr(row.spec, name) == value for row in table.rows for name, value in change.items())
    assert "Left out: 4 older runs" in (tmp_path / "tables" / "demo.md").read_text()


def test_what_is_half_made_again_is_refused_until_the_remedy_is_followed(tmp_path: Path, capsys: Any) -> None:
    old = {method: make_record(method, 0.5) for method in METHODS}
    for method, record in old.items():
        record.command = ["run.py", f"method={method}", "layers=[3,6]"]
        put(tmp_path, record)
    for method in METHODS[:2]:
        put(tmp_path, later(old[method], model_fingerprint="e" * 64))
    assert main(["tables", "--results", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert "model_fingerprint of toy: " in told and f"delete {tmp_path / 'experiments' / 'demo'}" in told
    commands = [shlex.split(line) for line in told.splitlines() if line.strip().startswith("python run.py")]
    assert sorted(command[2] for command in commands) == ["method=fastv", "method=random"], "the older ones"
    assert all(command[3] == "layers=[3,6]" and "force=true" not in command for command in commands)
    for command in commands:
        put(tmp_path, later(old[command[2].removeprefix("method=")], model_fingerprint="e" * 64))
    assert main(["tables", "--results", str(tmp_path)]) == 0


def test_a_fresh_start_helps_where_settings_differ(tmp_path: Path, capsys: Any) -> None:
    for limit in (10, 20):
        for method in METHODS:
            put(tmp_path, make_record(method, 0.5, limit=limit))
    assert main(["tables", "--results", str(tmp_path)]) == 1
    assert f"To mend it, delete {tmp_path / 'experiments' / 'demo'}" in capsys.readouterr().err
    for marker in (tmp_path / "experiments" / "demo").iterdir():
        if RunRecord.read(tmp_path / "runs" / marker.name).spec.limit == 10:
            marker.unlink()  # what running it again would not mark
    assert main(["tables", "--results", str(tmp_path)]) == 0


def test_two_checkpoints_of_one_name_are_not_mended_by_running_again(tmp_path: Path, capsys: Any) -> None:
    for method in METHODS:
        put(tmp_path, make_record(method, 0.5, model_path="/step100"))
        put(tmp_path, later(make_record(method, 0.5), model_path="/step200", model_fingerprint="e" * 64))
    assert main(["tables", "--results", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert "model_fingerprint of toy: " in told and "To mend it, delete" in told and "make the older ones" not in told


def test_a_method_of_ones_own_has_code_of_its_own(tmp_path: Path) -> None:
    for method in METHODS:
        put(tmp_path, make_record(method, 0.5, code="own" if method == "fastv" else "pdrop"))
    assert main(["tables", "--results", str(tmp_path)]) == 0
    assert "SEVERAL VERSIONS OF THE CODE: own, pdrop" in (tmp_path / "tables" / "demo.md").read_text()


def test_methods_of_one_version_raise_no_alarm_and_two_versions_of_one_do(tmp_path: Path) -> None:
    for method in METHODS:
        record = make_record(method, 0.5, code=f"with {method}")
        record.environment["sources"] = "pdrop"
        put(tmp_path, record)
    assert main(["tables", "--results", str(tmp_path)]) == 0
    assert "SEVERAL" not in (tmp_path / "tables" / "demo.md").read_text()
    newer = later(make_record("fastv", 0.25, code="with fastv, edited"))
    newer.environment["sources"] = "pdrop"
    put(tmp_path, newer)
    assert main(["tables", "--results", str(tmp_path), "--no-times"]) == 0
    page = (tmp_path / "tables" / "demo.md").read_text()
    assert "SEVERAL VERSIONS OF fastv: with fastv, with fastv, edited;" in page


def test_commits_without_a_change_of_code_are_one(tmp_path: Path) -> None:
    for number, method in enumerate(METHODS):
        record = make_record(method, 0.5, code="same")
        record.environment["git_commit"] = f"{number}" * 16
        put(tmp_path, record)
    assert main(["tables", "--results", str(tmp_path)]) == 0
    assert "SEVERAL" not in (tmp_path / "tables" / "demo.md").read_text()


def test_models_share_a_table_or_get_one_each(tmp_path: Path) -> None:
    for method in METHODS:
        put(tmp_path / "one", make_record(method, 0.5))
        put(tmp_path / "one", make_record(method, 0.5, model="big", model_fingerprint="b" * 64))
        put(tmp_path / "two", make_record(method, 0.5))
        put(tmp_path / "two", make_record(method, 0.5, model="big", dtype="float16", model_fingerprint="b" * 64))
    assert [part.stem for part in parts(load_experiment(tmp_path / "one", "demo"))] == ["demo"]
    assert main(["tables", "--results", str(tmp_path / "two")]) == 0
    page = (tmp_path / "two" / "tables" / "demo.md").read_text()
    assert "# demo: big\n" in page and "# demo: toy\n" in page and page.count("## What the columns mean") == 1
    lines = list(csv.DictReader(io.StringIO((tmp_path / "two" / "tables" / "demo.csv").read_text())))
    assert [(line["experiment"], line["model"]) for line in lines] == [
        (f"demo-{model}", model) for model in ("big", "toy") for _ in METHODS
    ]
    assert main(["figures", "--results", str(tmp_path / "two")]) == 0
    assert (tmp_path / "two" / "figures" / "demo-big-tradeoff.png").is_file()


def test_one_mixed_model_does_not_hide_the_other(tmp_path: Path, capsys: Any) -> None:
    for method in METHODS:
        put(tmp_path, make_record(method, 0.5, model="big", dtype="float16", limit=7 if method == "none" else None))
        put(tmp_path, make_record(method, 0.5))
    assert main(["tables", "--results", str(tmp_path)]) == 1
    assert "demo: big: these runs cannot be in one table" in capsys.readouterr().err
    assert "# demo: toy\n" in (tmp_path / "tables" / "demo.md").read_text()


def test_the_whole_store_is_split_into_tables_of_comparable_runs(tmp_path: Path, capsys: Any) -> None:
    fill(tmp_path, experiment=None)
    put(tmp_path, make_record("pyramiddrop", 0.5, limit=10), experiment=None)
    put(tmp_path, make_record("none", 1.0, limit=10), experiment=None)
    put(tmp_path, make_record("none", 1.0, tasks=("toy_exist",)), experiment=None)
    failed = make_record("fastv", 0.1, limit=10)
    failed.status, failed.cost, failed.error = "failed", None, "no memory"
    put(tmp_path, failed, experiment=None)
    alone = make_record("fastv", 0.1, limit=10, tasks=("toy_ocr",))
    alone.status, alone.cost = "running", None
    put(tmp_path, alone, experiment=None)
    assert main(["tables", "--results", str(tmp_path)]) == 0
    page = (tmp_path / "tables" / "all.md").read_text()
    assert [re.sub(r" \(\w{6}\)", "", line) for line in page.splitlines() if line.startswith("# ")] == [
        "# all, 1 of 4: all samples, toy_count+toy_exist+toy_ocr, 180 questions",
        "# all, 2 of 4: first 10 samples, toy_count+toy_exist+toy_ocr, 180 questions",
        "# all, 3 of 4: all samples, toy_exist, 60 questions",
        "# all, 4 of 4: first 10 samples, toy_ocr",
    ]
    found = parts(load_experiment(tmp_path, "all"))
    assert failed.spec.folder in [run.folder for run in found[1].runs]
    assert sum(len(part.runs) for part in found) == len(load_runs(tmp_path))
    for part in found:
        refuse_mixtures(load_experiment(tmp_path, "all"), part.runs, times=part.times)


def test_times_of_other_code_are_left_out_of_the_whole_store(tmp_path: Path) -> None:
    for method in METHODS:
        record = make_record(method, 0.5, code=method)
        record.environment["git_commit"] = method
        put(tmp_path, record, experiment=None)
    (part,) = parts(load_experiment(tmp_path, "all"))
    assert not part.times and len(part.runs) == len(METHODS)


def test_only_seeds_are_pooled(tmp_path: Path) -> None:
    put(tmp_path, make_record("none", 1.0))
    put(tmp_path, make_record("pyramiddrop", 0.5))
    put(tmp_path, make_record("pyramiddrop", 0.5, latency="off"))
    put(tmp_path, make_record("random", 0.5, latency="off"))
    put(tmp_path, make_record("random", 0.5, latency="off", seed=1))
    few = make_record("pyramiddrop", 0.5, tasks=("toy_exist",), latency="off")
    put(tmp_path, few)
    rows = table_of(tmp_path).rows
    assert sorted(len(row.runs) for row in rows) == [1, 1, 1, 1, 2]
    whole = [row for row in rows if row.spec.tasks != ("toy_exist",)]
    assert all(row.average is not None for row in whole)
    assert all((row.spread is not None) == (row.spec.method == "random") for row in whole)


def budgets_of(results: Path, name: str = "demo") -> dict[str, set[str]]:
    """Budget -> its schedules by method."""
    found: dict[str, set[str]] = {}
    for row in table_of(results, name).rows:
        found.setdefault(row.budget, set()).add(f"{row.spec.method} {row.spec.schedule}".strip())
    return found


def scheduled(method: str, schedule: Schedule) -> RunRecord:
    """A finished run of any schedule."""
    record = make_record(method, 0.5)
    assert record.cost
    record.cost.mean_keep = schedule.mean_keep(12)
    return replace(record, spec=replace(record.spec, schedule=str(schedule)))


def test_equal_tokens_are_one_budget(tmp_path: Path) -> None:
    for ratio in (0.5495, 0.4004, 0.133):
        put(tmp_path, scheduled("pyramiddrop", pyramid(12, ratio=ratio, layers=(1, 3, 6))))
    for ratio in (0.2727, 0.1515, 0.0303):
        put(tmp_path, scheduled("fastv", single(1, ratio)))
    found = budgets_of(tmp_path)
    assert list(found) == ["keep 33%", "keep 22%", "keep 11%"], "the mildest first"
    assert all({entry.split()[0] for entry in group} == {"pyramiddrop", "fastv"} for group in found.values())


def test_equal_ratios_are_one_budget_where_keeps_differ(tmp_path: Path) -> None:
    assert list(budgets_of(standard(tmp_path))) == ["", "0.5", "0.3", "0.1"]


def test_numbers_of_stages_are_budgets_of_their_own(tmp_path: Path) -> None:
    for stages in (2, 3, 4, 5):
        for method in ("pyramiddrop", "random"):
            put(tmp_path, scheduled(method, pyramid(12, stages)))
    found = budgets_of(tmp_path)
    assert list(found) == ["keep 75%", "keep 58%", "keep 47%", "keep 33%"]
    assert all(len(group) == 2 for group in found.values())


def test_cuts_at_different_layers_share_no_budget(tmp_path: Path) -> None:
    found = budgets_of(grid(tmp_path), "cuts")
    assert len(found) == 17 and "keep 62% at 3" in found and "keep 62% at 6" in found
    assert all(len({entry.split()[1] for entry in group}) == 1 for budget, group in found.items() if budget)
    assert [budget.split()[-1] for budget in found if budget] == sorted("1369" * 4)
