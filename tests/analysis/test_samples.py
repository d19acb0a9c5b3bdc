"""Samples on disk: two forms, one reader, and nothing that is shown depends on the form.

python -m pytest tests/analysis/test_samples.py
"""

from __future__ import annotations

import gzip
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from analysis.__main__ import main
from analysis.store.load import load_runs, samples_of
from pdrop.samples import condense, read_samples, samples_file, samples_files, write_samples
from tests.support.records import TASKS, grid, run_of, standard

STRANGE: list[dict[str, Any]] = [
    {"doc_id": "a/b", "question": "line\u2028apart\u0085 «é» \n?", "prompt": "<image>", "target": ["x", None]},
    {"doc_id": "c", "answer": ["no", "yes"], "losses": [0.1, 2.5e-9], "attention": {"map": ["AAA="]}, "own": {"n": 1}},
]


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """One store in the older form, and the same condensed."""
    old = grid(standard(tmp_path / "old"), layers=(1,), keeps=(0.1,))
    new = shutil.copytree(old, tmp_path / "new")
    assert main(["condense", "--results", str(new)]) == 0
    return old, new


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    write_samples(folder, {"a-task": STRANGE, "a": STRANGE[:1]})
    assert read_samples(folder, "a-task") == STRANGE and read_samples(folder, "a") == STRANGE[:1]
    assert read_samples(folder, "a-task", most=1) == STRANGE[:1]
    with pytest.raises(ValueError, match="has no samples of task: make the run again"):
        read_samples(folder, "task")
    assert (tmp_path / "questions").is_dir(), "beside the runs, for all of them"
    write_samples(tmp_path / "alone", {"a-task": STRANGE})
    moved = shutil.move(tmp_path / "alone", tmp_path / "elsewhere")
    assert read_samples(moved, "a-task") == STRANGE, "outside of a store a run holds its own questions"


def test_condensing_changes_no_line(two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    old, new = two
    held = {path.relative_to(old): path.read_bytes() for path in old.glob("runs/*/samples/*")}
    assert held and not list(new.glob("runs/*/samples"))
    for run in load_runs(new):
        for task in run.record.results:
            was = held[Path("runs", run.folder, "samples", f"{task}.jsonl")]
            capsys.readouterr()
            assert main(["samples", run.record.run_id, task, "--results", str(new)]) == 0
            assert [json.loads(line) for line in capsys.readouterr().out.split("\n")[:-1]] == [
                json.loads(line) for line in was.decode().split("\n")[:-1]
            ]
    assert len(list(new.glob("questions/*"))) == len(TASKS), "what was asked is stored once, not once per run"
    before = {path: path.read_bytes() for path in new.rglob("*") if path.suffix in (".gz", ".zip")}
    assert not [one for run in load_runs(new) for one in condense(run.path)], "there is nothing left to condense"
    assert {path: path.read_bytes() for path in new.rglob("*") if path.suffix in (".gz", ".zip")} == before


def test_everything_shown_is_the_same_from_both_forms(
    two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for results in two:
        first, second = (run_of(results, "pyramiddrop", keep).record.run_id for keep in ("3:0.5", "3:0.3"))
        for command in (
            ["tables", "demo"],
            ["hard", "demo", "--control", "random"],
            ["diff", first, second],
            ["report"],
        ):
            assert main([*command, "--results", str(results)]) == 0
        said.append(capsys.readouterr().out.replace(str(results), ""))
        assert all(samples_of(run, "toy_ocr") for run in load_runs(results) if run.done)
    assert said[0] == said[1] and "Kept sets" in said[0]
    made = [{p.name: p.read_bytes() for p in (results / "tables").iterdir()} for results in two]
    assert made[0] == made[1] and len(made[0]) == 5
    pages = [(results / "report.html").read_text().replace(str(results), "") for results in two]
    assert pages[0] == pages[1] and "number 7?" in pages[0]


def test_equal_samples_are_equal_bytes(tmp_path: Path) -> None:
    files = [write_samples(tmp_path / "runs" / name, {"t": STRANGE}).read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    assert len(list((tmp_path / "questions").iterdir())) == 1


def test_a_run_made_again_has_one_form(tmp_path: Path) -> None:
    run = run_of(standard(tmp_path), "none")
    write_samples(run.path, {task: read_samples(run.path, task) for task in TASKS})
    assert samples_files(run.path) == [samples_file(run.path, "toy_ocr")] == [run.path / "samples.zip"]


def test_what_holds_no_samples_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_of(standard(tmp_path), "none").path / "samples" / "toy_ocr.jsonl"
    text = path.read_text().replace('{"doc_id": 3,', '{"doc": 3,')
    path.write_text(text)
    assert main(["condense", "--results", str(tmp_path)]) == 1
    assert "toy_ocr.jsonl, line 4 is not a sample" in capsys.readouterr().err
    assert path.read_text() == text


@pytest.mark.parametrize(
    "spoilt", ['{"doc_id": 1}, {"doc_id": 2}', '{"doc_id": 1\n"x": 2}', '"doc_id"', "[]", '{"doc": 1}', "1]", "]"]
)
def test_a_line_is_one_sample(spoilt: str, tmp_path: Path) -> None:
    """Also where lines, read as one list, would make a list."""
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "toy.jsonl").write_text(f'{{"doc_id": 0}}\n{spoilt}\n{{"doc_id": 3}}\n')
    with pytest.raises(ValueError, match=r"toy\.jsonl, line 2 is not a sample"):
        read_samples(tmp_path, "toy")


def test_lost_or_damaged_files_are_named(tmp_path: Path) -> None:
    run = run_of(standard(tmp_path), "fastv", "0.5")
    for one in load_runs(tmp_path):
        condense(one.path)
    (questions,) = (tmp_path / "questions").glob("toy_ocr-*")
    file = run.path / "samples.zip"
    inside = file.read_bytes().index(b"toy_ocr") + 300
    whole, asked = file.read_bytes(), questions.read_bytes()
    damaged: list[tuple[Callable[[], object], str]] = [
        (lambda: file.write_bytes(whole[:-90]), "samples.zip is damaged"),
        (lambda: file.write_bytes(whole[:inside] + b"xyz" + whole[inside + 3 :]), "samples.zip is damaged"),
        (lambda: edit(file, '"doc_id": 7,', '"doc_id": 77,'), "are not of the same samples"),
        (lambda: edit(file, '{"doc_id": 7,', "{half a line"), "samples.zip, line 8 is not a sample"),
        (lambda: edit(file, '"kept": ["', '"kept": ["f'), "sample 1 does not say .* a token after the last"),
        (lambda: file.write_bytes(b""), "samples.zip is damaged"),
        (file.unlink, "samples.zip with it"),
        (lambda: questions.write_bytes(asked[:90]), "toy_ocr-.* is damaged"),
        (lambda: questions.write_bytes(gzip.compress(b"{}")), "toy_ocr-.* does not hold what its name says"),
        (questions.unlink, "samples.zip: its questions are missing .*: copy them along with the run"),
    ]
    for damage, message in damaged:
        damage()
        with pytest.raises(ValueError, match=message):
            samples_of(run, "toy_ocr")
        file.write_bytes(whole)
        questions.write_bytes(asked)
    samples_of(run, "toy_ocr")
    questions.unlink()
    assert main(["tables", "--results", str(tmp_path)]) == 1


def edit(path: Path, old: str, new: str) -> None:
    """Change every member of a samples file."""
    with zipfile.ZipFile(path) as file:
        held = {name: file.read(name).decode() for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, text in held.items():
            assert old in text
            file.writestr(name, text.replace(old, new))


def test_what_is_printed_is_json_whatever_the_answer_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(standard(tmp_path), "none")
    strange = [{"doc_id": 0, "question": "é\u2028\u202e", "answer": "\x1b[2J\x9b1m\x7f\U000e0041 \t\n"}]
    write_samples(run.path, {"toy_ocr": strange})
    capsys.readouterr()
    assert main(["samples", run.record.run_id, "toy_ocr", "--results", str(tmp_path)]) == 0
    (line, rest) = capsys.readouterr().out.split("\n")
    assert json.loads(line) == strange[0] and not rest
    assert line.isprintable() and "é" in line
