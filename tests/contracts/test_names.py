"""Names that become parts of paths: one grammar, at every door and where a record is read."""

import dataclasses
import json

import pytest

from pdrop import names
from pdrop.cli import run
from pdrop.evaluation import task_index
from pdrop.record import RunRecord
from pdrop.training.record import TrainingRecord, TrainingSpec
from tests.contracts.test_record import record
from tests.support.command_line import called
from tests.support.records import make_record

BAD = [
    "",
    ".",
    "..",
    "../x",
    "a/b",
    "/etc",
    ".hidden",
    "-rf",
    "a b",
    "a\nb",
    "\\input{x}",
    "=1",
    "a\x1b[2J",
    "é",
    "x" * 81,
]
GOOD = ["a", "llava_1_5_7b", "refcoco+_bbox", "a..b", "0", "_x", "trained_none_ratio0.5-seed0", "x" * 80]


def test_the_grammar():
    for text in GOOD:
        assert names.check("x", text) == text
    for text in [*BAD, None, 5]:
        assert not names.is_name(text)
        with pytest.raises(ValueError, match=r"^model\.name becomes part of a path: letters") as error:
            names.check("model.name", text)
        assert str(error.value).isprintable(), "a refusal prints no escape sequence of the name"
    assert names.as_name("../../x y") == ".._.._x_y"


@pytest.mark.parametrize("bad", BAD)
def test_a_record_with_such_a_name_is_not_read(bad, tmp_path):
    good = record()
    (task,) = good.results
    strangers = [
        dataclasses.replace(good, spec=dataclasses.replace(good.spec, **{part: bad})) for part in ("model", "method")
    ]
    strangers.append(dataclasses.replace(good, spec=dataclasses.replace(good.spec, tasks=(task, bad))))
    strangers.append(dataclasses.replace(good, results={bad: good.results[task]}))
    for stranger in strangers:
        (tmp_path / "record.json").write_text(stranger.to_json())
        with pytest.raises(ValueError, match="becomes part of a path"):
            RunRecord.read(tmp_path)


@pytest.mark.parametrize("part", ["recipe", "model", "method"])
def test_nor_is_a_training(part, tmp_path):
    filled = {f.name: 0 if f.type == "int" else "x" for f in dataclasses.fields(TrainingSpec)}
    training = TrainingRecord(TrainingSpec(**filled), "done", "2026-01-01T00:00:00Z")
    training.write(tmp_path)
    assert TrainingRecord.read(tmp_path).spec.model == "x"
    dataclasses.replace(training, spec=TrainingSpec(**filled | {part: "../x"})).write(tmp_path)
    with pytest.raises(ValueError, match=rf"spec\.{part} becomes part of a path"):
        TrainingRecord.read(tmp_path)


def test_doors_refuse_before_anything_is_written(tmp_path, monkeypatch, capfd):
    from pdrop.cli import train

    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data.json"
    data.write_text(json.dumps([]))
    quick = ["tasks=none", "latency=off"]
    doors = [
        (run.main, [*quick, "experiment=../../x"], "experiment becomes"),
        (run.main, [*quick, "experiment=.."], "experiment becomes"),
        (run.main, [*quick, "model.name=.."], r"model.name becomes"),
        (run.main, [*quick, "model.name=../../x"], r"model.name becomes"),
        (train.main, [f"train.data={data}", "train.name=../../x"], "train.name becomes"),
        (train.main, [f"train.data={data}", "model.name=."], "model.name becomes"),
    ]
    for main, words, told in doors:
        code, said = called(main, "x.py", tuple(words), monkeypatch, capfd)
        assert code == 1 and told in said and said.count("\n") == 1, (words, said)
    assert {path.name for path in tmp_path.iterdir()} <= {"data.json", "outputs"}


def test_a_task_folder_names_no_path(tmp_path):
    (tmp_path / "mine.yaml").write_text("task: ../../../mine\n")
    (tmp_path / "all.yaml").write_text("group: all_mine\ntask:\n  - ../../../mine\n")
    for name in ("../../../mine", "all_mine"):
        with pytest.raises(ValueError, match=r"a task of .*mine\.yaml becomes part of a path"):
            task_index.find([name], [tmp_path])


def test_what_lmms_eval_ships_has_names():
    assert all(map(names.is_name, task_index.index()))


def test_what_runs_are_called_has_names():
    assert names.is_name(make_record("pyramiddrop", 0.5).spec.folder)
