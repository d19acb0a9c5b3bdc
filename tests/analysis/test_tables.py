"""Tables from made-up records: what is printed, in three formats, and what runs are told in explain.

python -m pytest tests/analysis/test_tables.py
"""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis.__main__ import main
from analysis.comparison.table_model import Cell
from analysis.grid import Grid, Text, escape_latex
from analysis.report import explain
from analysis.statistics import Estimate
from analysis.store.load import load_runs
from analysis.tables.table import by_layer, grids, markdown, papers_average
from analysis.tables.text import percent
from tests.support.records import TASKS, answers, fill, make_record, put, rewrite, run_of, standard, table_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder that tests only read."""
    return standard(tmp_path_factory.mktemp("store"))


@pytest.fixture
def copied(store: Path, tmp_path: Path) -> Path:
    """A results folder that a test may change."""
    return Path(shutil.copytree(store, tmp_path / "results"))


GOLDEN = """
| budget | method | schedule | keep % | tokens | FLOPs % | KV % | time % | average | Δ none [95 %] | n |
| – | none | – | 100.0 | 64.0 | 100.0 | 100.0 | – | 86.1 | – | 180 |
| 0.5 | FastV | 2:0.5 | 58.3 | 37.3 | 66.7 | 58.3 | 68.0 [66.8, 69.2] | **75.0** | −11.1 [−15.5, −6.9] | 180 |
| 0.5 | PyramidDrop | [P5] | 46.9 | 30.0 | 57.5 | 46.9 | 58.6 [57.4, 59.8] | **80.0** | −6.1 [−10.2, −2.3] | 180 |
| 0.5 | Random | [P5] | 46.9 | 30.0 | 57.5 | 46.9 | 58.6 [57.4, 59.8] | *70.3 ± 0.4* | −15.8 [−21.8, −10.2] | 180 |
| 0.3 | FastV | 2:0.3 | 41.7 | 26.5 | 53.3 | 41.7 | 54.4 [53.2, 55.6] | *71.7* | −14.4 [−19.5, −9.6] | 180 |
| 0.3 | PyramidDrop | [P3] | 35.4 | 22.2 | 48.3 | 35.4 | 49.3 [48.1, 50.5] | **78.9** | −7.2 [−11.3, −3.3] | 180 |
| 0.3 | Random | [P3] | 35.4 | 22.2 | 48.3 | 35.4 | 49.3 [48.1, 50.5] | 65.3 ± 1.2 | −20.8 [−27.2, −14.8] | 180 |
| 0.1 | FastV (failed) | 2:0.1 | – | – | – | – | – | – | – | – |
"""


def test_golden_table(store: Path) -> None:
    page = markdown([table_of(store)])
    grid = page.split("## Score against cost")[1].split("##")[0].strip()
    lines = [re.sub(r" +", " ", line) for line in grid.splitlines()]
    expected = GOLDEN.replace("[P5]", "3:0.5 6:0.25 9:0.125").replace("[P3]", "3:0.3 6:0.09 9:0.027")
    assert [line for line in lines if "--" not in line] == expected.strip().splitlines()


def test_numbers_of_a_row_are_those_of_its_records(store: Path) -> None:
    table = table_of(store)
    base = run_of(store, "none")
    for row in table.rows:
        if row.status != "done":
            continue
        means = [np.mean([np.mean(answers(run.record, task, 60)) for task in TASKS]) for run in row.runs]
        assert row.average.score.value == pytest.approx(np.mean(means))
        if len(means) > 1:
            assert row.spread == pytest.approx(np.std(means, ddof=1))
        for task in TASKS:
            before, after = (answers(run.record, task, 60) for run in (base, row.runs[0]))
            cell = row.cells[task]
            if row.drops and len(row.runs) == 1:
                assert cell.delta.value == pytest.approx(after.mean() - before.mean())
                assert cell.flips.lost - cell.flips.gained == round(before.sum() - after.sum())
                assert cell.delta.low <= cell.delta.value <= cell.delta.high
            else:
                assert cell.flips is None


def test_random_twin_is_the_one_on_the_same_schedule(store: Path) -> None:
    for row in table_of(store).rows:
        assert (row.against_random is not None) == (row.spec.method == "pyramiddrop")


def test_a_twin_has_the_same_positions(tmp_path: Path) -> None:
    for method, positions in (("pyramiddrop", "compact"), ("pyramiddrop", "original"), ("random", "original")):
        put(tmp_path, make_record(method, 0.5, positions=positions))
    found = {(row.spec.method, row.spec.positions): row.against_random for row in table_of(tmp_path).rows}
    assert found["pyramiddrop", "compact"] is None and found["pyramiddrop", "original"] is not None


def test_best_is_marked_only_where_it_can_be_told(store: Path, tmp_path: Path) -> None:
    table = table_of(store)
    marks = {(row.budget, row.spec.method): row.average.mark for row in table.rows if row.average}
    assert marks["0.3", "pyramiddrop"] == "best" and marks["0.3", "random"] == "" and marks["", "none"] == ""
    twins = tmp_path / "twins"  # two methods with the same answers, one of them with other arguments
    for arguments in ("{}", '{"heads":2}'):
        put(twins, make_record("pyramiddrop", 0.5, method_args=arguments))
    assert [row.average.mark for row in table_of(twins).rows] == ["", ""]


def test_floor_and_missing_cells(copied: Path) -> None:
    (copied / "floors.json").write_text('{"families": {"exist": {"floor": 0.5}}}')
    assert table_of(copied).floors == {}  # the store's tasks are not the embedded ones
    (copied / "experiments" / "demo" / "toy-fastv-aaaaaaaaaaaa").write_text("")
    page = markdown([table_of(copied)])
    assert "NOT RUN YET: toy-fastv-aaaaaaaaaaaa" in page
    row = next(line for line in page.splitlines() if "FastV (failed)" in line)
    assert set(re.sub(r"[|\s]", " ", row).split()[4:]) == {"–"}
    assert "RuntimeError: toy_ocr, doc 3: no memory" in page


def test_blind_guess_row_and_scale(tmp_path: Path) -> None:
    tasks = ("embedded_existence", "embedded_counting")
    fill(tmp_path, ratios=(0.5,), seeds=1, tasks=tasks)
    (tmp_path / "floors.json").write_text('{"families": {"existence": {"floor": 0.5}, "counting": {"floor": 0.2}}}')
    table = table_of(tmp_path)
    assert table.floor == pytest.approx(0.35)
    full = table.rows[0].average.score.value
    for row in table.rows:
        assert row.floor_to_full == pytest.approx((row.average.score.value - 0.35) / (full - 0.35))
    assert "| blind guess |" in re.sub(r" +", " ", markdown([table]))


def test_a_score_that_is_no_mean_has_no_interval(copied: Path) -> None:
    run = run_of(copied, "fastv", "0.5")
    for each in load_runs(copied):
        if each.done:
            each.record.results["toy_exist"].scores["acc"].value *= 0.9  # as an F1 would differ from the accuracy
            each.record.write(each.path)
    table = table_of(copied)
    row = next(row for row in table.rows if row.runs[0].folder == run.folder)
    assert row.cells["toy_exist"].delta.low is None and row.average.delta.low is None
    assert row.cells["toy_ocr"].delta.low is not None
    assert "no interval" in markdown([table])


def test_csv_holds_raw_numbers_ids_and_intervals(copied: Path) -> None:
    assert main(["tables", "demo", "--results", str(copied)]) == 0
    lines = list(csv.DictReader(io.StringIO((copied / "tables" / "demo.csv").read_text())))
    table = table_of(copied)
    assert [line["run_ids"].split() for line in lines] == [[r.record.run_id for r in row.runs] for row in table.rows]
    for line, row in zip(lines, table.rows):
        if row.status == "done" and row.drops:
            assert float(line["average"]) == pytest.approx(row.average.score.value, rel=1e-9)
            assert float(line["toy_ocr_delta_low"]) == pytest.approx(row.cells["toy_ocr"].delta.low, abs=1e-9)
    assert lines[-1]["status"] == "failed" and lines[-1]["average"] == ""


def test_latex_is_escaped_and_marked(copied: Path) -> None:
    assert escape_latex("50 % of a_b & {c} ↓") == r"50 \% of a\_b \& \{c\} $^{\downarrow}$"
    assert main(["tables", "demo", "--results", str(copied)]) == 0
    text = (copied / "tables" / "demo.tex").read_text()
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 2 and r"\textbf{" in text and "keep \\%" in text
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len({line.replace(r"\&", "").count("&") for line in rows if "FastV" in line}) == 2  # one width a grid
    assert not re.search(r"(?<!\\)%(?! made by|$)", text, re.MULTILINE)
    main_caption, by_task = (line for line in text.splitlines() if line.startswith(r"\caption"))
    assert "above dropping nothing" in by_task and "arrow" not in main_caption, "a mark is explained where it stands"


def test_second_time_nothing_is_written(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("tables", "figures"):
        assert main([command, "--results", str(copied)]) == 0
    made = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in copied.glob("[tf]*/demo*")}
    assert len(made) == 5
    capsys.readouterr()
    for command in ("tables", "figures"):
        assert main([command, "--results", str(copied)]) == 0
    assert "wrote" not in capsys.readouterr().out
    assert made == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in made}


def test_ten_cells_of_ten_tasks_are_quick(tmp_path: Path) -> None:
    fill(tmp_path, ratios=(0.7, 0.5, 0.3), seeds=1, tasks=tuple(f"toy_{i}" for i in range(10)), n=200)
    started = time.process_time()
    table = table_of(tmp_path)
    assert len(table.rows) == 10 and time.process_time() - started < 3


def test_tables_figures_and_report_need_no_torch(copied: Path) -> None:
    made = {"tables": "tables/demo.md", "figures": "figures/demo-tradeoff.png", "report": "report.html"}
    code = (
        "import sys; from analysis.__main__ import main\n"
        "for command in sys.argv[2:]:\n"
        "    code = main([command, '--results', sys.argv[1]])\n"
        "    bad = {'torch', 'transformers', 'lmms_eval', 'hydra'} & set(sys.modules)\n"
        "    if bad or code: sys.exit(f'{command}: {bad} {code}')\n"
    )
    arguments = [sys.executable, "-c", code, str(copied), *made]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all((copied / path).exists() for path in made.values())


def test_a_reader_who_stops_reading_is_no_error(copied: Path) -> None:
    for command in (["list"], ["tables"]):
        options = [sys.executable, "-m", "analysis", *command, "--results", str(copied)]
        with subprocess.Popen(options, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == b"" and process.wait() == 0
    assert (copied / "tables" / "demo.tex").is_file()


def test_list_explain_and_diff(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--results", str(copied)]
    assert main(["list", *options]) == 0
    listed = capsys.readouterr().out
    assert all(run.record.run_id in listed for run in load_runs(copied)) and "failed" in listed
    first, second = run_of(copied, "pyramiddrop", "0.5"), run_of(copied, "fastv", "0.3")
    assert main(["explain", first.record.run_id[:8], *options]) == 0
    told = capsys.readouterr().out
    for part in (
        "3:0.5 6:0.25 9:0.125",
        "0123456789",
        "Test CPU",
        "toy_ocr: acc",
        "of 120 samples",
        "run.py method=pyr",
    ):
        assert part in told
    rewrite(second, processor="Other CPU")
    assert main(["diff", first.record.run_id, second.record.run_id, *options]) == 0
    told = capsys.readouterr().out
    for part in ("method: pyramiddrop | fastv", "schedule: 3:0.5", "processor: Test CPU | Other CPU", "McNemar p"):
        assert part in told
    assert "dtype:" not in told and "seed:" not in told
    assert main(["explain", "zzz", *options]) == 1
    assert "no run" in capsys.readouterr().err


def test_diff_does_not_compare_other_data(copied: Path) -> None:
    rewrite(run_of(copied, "fastv", "0.5"), data_hash="other")
    told = explain.diff(run_of(copied, "none"), run_of(copied, "fastv", "0.5"))
    assert "toy_exist: not compared, data_hash differ" in told and "toy_ocr: " in told


def test_the_papers_layout(store: Path) -> None:
    """Method x benchmark, Avg with a twentieth of MME's points, and the share of the model that drops nothing."""
    demo = table_of(store)
    row = next(r for r in demo.rows if r.spec.method == "pyramiddrop" and r.budget == "0.5")
    by_task = grids(demo)[1]
    assert list(by_task.head)[-2:] == ["average", "of none %"]
    assert [cell.text for cell in by_task.rows[demo.rows.index(row)]][-2:] == ["80.0", percent(row.share_of_none)]
    assert by_layer(row) == "64 x3 32 x3 16 x3 8 x3"
    points = replace(demo.tasks["toy_ocr"], name="mme", fraction=False)
    table = replace(demo, tasks={**demo.tasks, "mme": points})
    row.cells["mme"] = Cell(Estimate(1500.0))
    assert papers_average(row, table) == pytest.approx((3 * 0.8 + 1500 / 20 / 100) / 4)
    assert list(grids(table)[1].head)[-3:] == ["average", "Avg, MME/20", "of none %"]
    del row.cells["mme"]
    assert papers_average(row, table) is None, "a missing score is not a zero"


@pytest.mark.parametrize("width", [20, 40, 60, 200])
def test_a_grid_wider_than_the_terminal_is_shown_in_parts_and_loses_nothing(width: int) -> None:
    head = ["budget", "method", "schedule", *(f"column {n}" for n in range(6))]
    rows = [[Text(f"{name} {row}") for name in head] for row in range(3)]
    parts = Grid("scores", head, 3, rows).folded(width)
    assert (len(parts) == 1) == (width == 200)
    assert [name for part in parts for name in part.head[2:]] == head[2:] and parts[0].left == 3
    for part in parts:
        assert list(part.head[:2]) == head[:2] and [len(row) for row in part.rows] == [len(part.head)] * 3
        assert all(cell.text.startswith(name) for row in part.rows for name, cell in zip(part.head, row, strict=True))
        assert len(part.head) == 3 or max(map(len, part.markdown().splitlines())) <= width
