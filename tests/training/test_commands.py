"""The commands that score a study's trainings.

python -m pytest tests/training/test_commands.py
"""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest

from pdrop.training.commands import by_layer, commands, main
from pdrop.training.record import FILE, FORMAT, TrainingRecord, TrainingSpec

EMPTY = {"str": "x", "str | None": None, "int": 1, "bool": False}


def put(
    folder: Path, method: str, schedule: str, seed: int, *dials: str, status: str = "done", records: int = 1
) -> None:
    values = {each.name: EMPTY[str(each.type)] for each in dataclasses.fields(TrainingSpec)}
    values |= {"method": method, "schedule": schedule, "seed": seed, "format_version": FORMAT, "start": "{}"}
    values |= {"format": "chat", "image_mode": "crop"}
    values |= {"model": "tiny", "model_path": "package://somewhere/tiny", "records": records}
    record = TrainingRecord(TrainingSpec(**values), status, "2026-01-01T00:00:00Z")
    record.command = ["train.py", f"method={method}", f"seed={seed}", *dials, "train.steps=9"]
    target = folder / f"{method}{seed}{''.join(dials)}of{records}"
    target.mkdir()
    record.write(target)


def test_each_model_is_scored_whole_and_as_it_was_trained_and_the_plain_one_in_every_way(tmp_path: Path) -> None:
    put(tmp_path, "none", "", 0)
    put(tmp_path, "none", "", 1)
    put(tmp_path, "fastv", "2:0.5", 0)
    put(tmp_path, "pyramiddrop", "3:0.4 6:0.16 9:0.064", 0, "ratio=0.4")
    put(tmp_path, "pyramiddrop", "3:0.5 6:0.25 9:0.125", 1)
    put(tmp_path, "fastv", "2:0.5", 2, status="running")
    lines = [shlex.split(line) for line in commands(tmp_path, ["batch_size=4"])]
    ways = {}
    for line in lines:
        assert line[1:5] == ["run.py", "-m", "experiments=training", "model=folder"] and line[-1] == "batch_size=4"
        name, path = (word.partition("=")[2] for word in line[5:7])
        assert (
            path == "package://somewhere/tiny" if name == "tiny_not_finetuned" else (Path(path).parent / FILE).exists()
        )
        ways.setdefault(name, []).append(line[7:-1])
    assert ways == {
        "tiny_not_finetuned": [["method=none,fastv,pyramiddrop"], ["method=pyramiddrop", "ratio=0.4"]],
        "trained_none_seed0": [["method=none,fastv"], ["method=pyramiddrop", "ratio=0.4"]],
        "trained_none_seed1": [["method=none,pyramiddrop"]],
        "trained_fastv_seed0": [["method=none,fastv"]],
        "trained_pyramiddrop_ratio0.4_seed0": [["method=none,pyramiddrop", "ratio=0.4"]],
        "trained_pyramiddrop_seed1": [["method=none,pyramiddrop"]],
    }


def test_trainings_on_other_data_are_a_study_of_their_own_under_their_own_names(tmp_path: Path) -> None:
    put(tmp_path, "none", "", 0)
    put(tmp_path, "fastv", "2:0.5", 0)
    put(tmp_path, "fastv", "2:0.5", 0, records=20)
    put(tmp_path, "pyramiddrop", "3:0.5 6:0.25 9:0.125", 0, records=20)
    lines = [shlex.split(line) for line in commands(tmp_path)]
    ways = {line[5].removeprefix("model.name="): line[7] for line in lines}
    ids = [TrainingRecord.read(tmp_path / f"fastv0of{records}").spec.training_id for records in (1, 20)]
    assert ways == {
        "tiny_not_finetuned": "method=none,fastv,pyramiddrop",
        "trained_none_seed0": "method=none,fastv",
        f"trained_fastv_seed0_{ids[0]}": "method=none,fastv",
        f"trained_fastv_seed0_{ids[1]}": "method=none,fastv",
        "trained_pyramiddrop_seed0": "method=none,pyramiddrop",
    }


def test_what_is_no_name_on_the_command_line_is_made_one(tmp_path: Path) -> None:
    put(tmp_path, "random_fastv", "3:0.5 6:0.5", 0, "twin=true", "layers=[3,6]")
    lines = [shlex.split(line) for line in commands(tmp_path)]
    assert [line[5] for line in lines] == [
        "model.name=tiny_not_finetuned",
        "model.name=trained_fastv_twintrue_layers-3-6-_seed0",
    ]
    assert all(line[7:] == ["method=none,fastv", "twin=true", "layers=[3,6]"] for line in lines)


def test_a_model_is_asked_as_it_was_trained(tmp_path: Path) -> None:
    put(tmp_path, "none", "", 0)
    record = TrainingRecord.read(tmp_path / "none0of1")
    told = ["model=folder", "model.name=mine", "model.path=there"]
    assert record.scoring("mine", "there") == told
    record.spec = dataclasses.replace(record.spec, format="vicuna_v1", image_mode="pad")
    assert record.scoring("mine", "there") == [*told, "model.prompt=vicuna_v1", "model.image_mode=pad"]


def test_models_of_one_seed_and_the_default_dials_are_cut_layer_by_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, "none", "", 3)
    put(tmp_path, "none", "", 4)
    put(tmp_path, "fastv", "2:0.5", 3)
    put(tmp_path, "pyramiddrop", "3:0.4 6:0.16 9:0.064", 3, "ratio=0.4")
    lines = [shlex.split(line) for line in by_layer(tmp_path, ["limit=7"])]
    assert [line[5] for line in lines] == ["model.name=trained_fastv_seed3", "model.name=trained_none_seed3"]
    assert all(line[3:5] == ["experiments=redundancy_trained", "model=folder"] for line in lines)
    assert all(line[7:] == ["limit=7"] for line in lines)
    main([str(tmp_path), "--layers", "limit=7"])
    assert [shlex.split(line) for line in capsys.readouterr().out.splitlines()] == lines


def test_a_folder_without_a_finished_training_is_refused_in_one_line(tmp_path: Path) -> None:
    put(tmp_path, "fastv", "2:0.5", 2, status="failed")
    with pytest.raises(SystemExit, match=r"error: no finished training under .*: python train.py output=") as refused:
        main([str(tmp_path)])
    assert "\n" not in str(refused.value)
