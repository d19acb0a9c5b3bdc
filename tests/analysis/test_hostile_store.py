"""A store that comes from a stranger: what its records say becomes no HTML, no formula, no escape sequence, no command
of LaTeX and no path.

pytest tests/analysis/test_hostile_store.py
"""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from analysis.__main__ import main
from analysis.grid import Text
from analysis.neutral import in_cell, in_page
from analysis.store.load import experiments, load_runs
from pdrop.names import printable
from tests.support.records import make_record, masks, put, run_of, standard, table_of

POISON = "=1+1|<img src=x onerror=alert(1)>\x1b[2J![a](http://x.example/y)\n[a]: http://x.example \\input{x}\u202e$"
FREE = ("model_path", "revision", "model_fingerprint", "dtype", "attn_implementation", "sdpa_kernel", "prompt")
FREE += ("image_mode", "device", "code", "task_files", "positions")


def poisoned(record: Any) -> Any:
    """The record with the poison in every text that is not a name."""
    told = {"versions": json.dumps({"torch": POISON, POISON: "1"}), "method_args": json.dumps({POISON: POISON})}
    spec = replace(record.spec, **told, **dict.fromkeys(FREE, POISON))
    environment = {key: POISON if isinstance(value, str) else value for key, value in record.environment.items()}
    environment["packages"] = {POISON: POISON, "torch": POISON}
    return replace(record, spec=spec, environment=environment, command=[POISON], error=f"Traceback\n{POISON[:60]}")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    results = tmp_path / "results"
    for method in ("none", "pyramiddrop", "fastv"):
        put(results, poisoned(make_record(method, 1.0 if method == "none" else 0.5)), n=20)
    failed = poisoned(make_record("fastv", 0.1))
    failed.status, failed.cost = "failed", None
    put(results, failed)
    for path in results.glob("runs/*/record.json"):
        data = json.loads(path.read_text())
        del data["checksum"]  # as a stranger would
        for result in data["results"].values():
            result["version"] = result["data_hash"] = result["prompt_hash"] = POISON
        path.write_text(json.dumps(data))
    return results


def test_no_page_holds_what_a_browser_would_run(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tables", "--results", str(store), "demo"]) == 0
    pages = [(store / "tables" / "demo.md").read_text(), capsys.readouterr().out]
    assert "onerror" in pages[0], "it is shown, as text"
    for words in (["list"], ["explain", run_of(store, "fastv", "0.5").record.run_id]):
        assert main([*words, "--results", str(store)]) == 0
        pages.append(capsys.readouterr().out)
    first, second = (run.record.run_id for run in load_runs(store)[:2])
    assert main(["diff", first, second, "--results", str(store)]) == 0
    pages.append(capsys.readouterr().out)
    for page in pages:
        assert all(character.isprintable() or character in "\n\t" for character in page)
    assert "<img" not in pages[0] and "](http" not in pages[0] and "]: http" not in pages[0]


def test_csv_and_latex_hold_no_command(store: Path) -> None:
    assert main(["tables", "--results", str(store), "demo"]) == 0
    with (store / "tables" / "demo.csv").open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert any("=1+1" in cell for cell in cells)
    assert not [cell for cell in cells if cell[:1] in "=@\t\r" and cell], cells
    text = (store / "tables" / "demo.tex").read_text()
    assert "\\input" not in text and "\x1b" not in text


def test_an_experiment_of_another_name_is_refused_and_the_others_are_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = standard(tmp_path / "results")
    for name in ("\\input{x}", "\x1b[2J", "-x"):
        (results / "experiments" / name).mkdir()
    for command in ("tables", "report"):
        code = main([command, "--results", str(results)])
        said = capsys.readouterr()
        assert "\x1b" not in said.out + said.err
        if command == "tables":
            assert code == 1 and said.err.count("an experiment becomes part of a path") == 3
    assert (results / "tables" / "demo.md").is_file() and (results / "report.html").is_file()
    assert len(experiments(results)) == 4
    assert main(["tables", "--results", str(results), "../../x"]) == 1
    assert "an experiment becomes part of a path" in capsys.readouterr().err


def test_a_model_called_like_a_path_writes_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = standard(tmp_path / "results")
    path = run_of(results, "fastv", "0.5").path / "record.json"
    record = json.loads(path.read_text())
    record["spec"]["model"] = "../../x"
    path.write_text(json.dumps(record))
    for command in ("tables", "figures", "list", "report"):
        assert main([command, "--results", str(results)]) == 1
        assert "spec.model becomes part of a path" in capsys.readouterr().err
    assert {entry.name for entry in tmp_path.iterdir()} == {"results"}


def test_a_sample_called_like_a_path_is_drawn_inside_the_store(tmp_path: Path) -> None:
    results, pictures = tmp_path / "store" / "results", tmp_path / "pictures"
    record = make_record("pyramiddrop", 0.5, tasks=("toy_ocr",))
    folder = put(results, record, n=1)
    path = folder / "samples" / "toy_ocr.jsonl"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"doc_id": "../../../x", "kept": masks(record, 0)}) + "\n"
    )
    pictures.mkdir()
    Image.new("RGB", (40, 40), "red").save(pictures / "image0.png")
    assert main(["overlay", record.run_id, "--pdf", "--images", str(pictures), "--results", str(results)]) == 0
    drawn = [entry for entry in tmp_path.rglob("*overlay*") if entry.is_file()]
    assert len(drawn) == 2 and all(entry.parent == results / "figures" for entry in drawn)


def test_a_training_called_like_a_path_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.analysis.test_trainings import put as put_training

    put_training(tmp_path, "none-1", 1.0, 1.0, recipe="../x")
    assert main(["trainings", "--results", str(tmp_path)]) == 1
    assert "spec.recipe becomes part of a path" in capsys.readouterr().err


def test_a_label_is_a_label(tmp_path: Path) -> None:
    table = table_of(standard(tmp_path / "results"))
    from analysis.tables.table import grids

    assert r"\label{tab:a--input-x--}" in grids(table)[0].latex("a}\\input{x}}", "")


def test_cells_and_pages_of_ours_stay_as_they_are() -> None:
    for text in (
        "−1.2 [−3.0, 0.4]",
        "above (5 seeds, p <0.001)",
        "`runs/<folder>/record.json`",
        "144×3 72×9",
        "Δ [95 %]",
    ):
        assert in_page(text) == text and Text(text).markdown() == text
    for value in ("-0.5", "+1e-3", "-.5", -0.5, 3, None, "", "3:0.5 6:0.25", "–"):
        assert in_cell(value) == value
    for text in ("=1", "+cmd|x", "-cmd", "@sum", "\t=1", "\r=1", "-1+1"):
        assert in_cell(text) == f"'{text}"
    assert Text("a\\|b").markdown() == "a\\\\\\|b", "a backslash does not take the bar's escape away"
    assert printable("a\x1b]0;x\x07\u202e\u2028\x85é中") == "a\\x1b]0;x\\x07\\u202e\\u2028\\x85é中"
    hostile = "<b>![x](y)<!--</b><?php [z]: q [z][q]"
    assert in_page(in_page(hostile)) == in_page(hostile) == "&lt;b>![x]\\(y)&lt;!--&lt;/b>&lt;?php [z]\\: q [z]\\[q]"
