"""Trainings as a page: what may stand in one grid, the ratios to dropping nothing, and what is left out.

pytest tests/analysis/test_trainings.py
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from analysis.__main__ import main
from analysis.statistics import Estimate, interval, over_seeds
from analysis.studies import trained_figure
from analysis.studies.trained import START, WHOLE, Outcome, Way
from pdrop.record import TRAINING_VARIES
from pdrop.training.record import TrainingSpec
from tests.support import records


def put(results: Path, name: str, seconds: float, loss: float, minute: int = 0, **spec: Any) -> None:
    """A finished training whose steps take `seconds`; the first, which sets up, takes ten times as long.

    It starts so many minutes past eleven and takes five minutes.
    """
    whole = {
        "recipe": "tiny", "model": "embedded", "model_fingerprint": "a" * 16, "data_fingerprint": "b" * 16,
        "records": 60, "method": "none", "method_args": "{}", "schedule": "", "positions": "original", "seed": 0,
        "steps": 30, "batch_size": 2, "dtype": "float32", "attn_implementation": "sdpa",
    } | spec  # fmt: skip
    flops = 50.0 if whole["schedule"] else 80.0
    record = {
        "training_id": name, "spec": whole, "status": "done", "started_at": f"2026-01-02T11:{minute:02}:00Z",
        "cost": {"wall_s": 300.0, "visual_tokens_per_layer": [16.0, 8.0],
                 "step_flops": flops, "step_flops_unpruned": 80.0},
        "environment": {"processor": "Test CPU", "git_commit": "c" * 40, "git_dirty": False},
    }  # fmt: skip
    folder = results / "trainings" / name
    folder.mkdir(parents=True)
    (folder / "training.json").write_text(json.dumps(record))
    lines = [f"{step},{9.0 if step < 10 else loss},{seconds * (10 if step == 0 else 1)}" for step in range(30)]
    (folder / "curve.csv").write_text("step,loss,step_cpu_s\n" + "\n".join(lines) + "\n")


def rows(results: Path) -> list[list[str]]:
    text = (results / "tables/trainings.md").read_text()
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_ratios_are_to_the_training_that_drops_nothing(tmp_path: Path) -> None:
    put(tmp_path, "whole", 2.0, 0.5)
    put(tmp_path, "half", 1.2, 0.6, method="pyramiddrop", schedule="1:0.5")
    assert main(["trainings", "--results", str(tmp_path)]) == 0
    _, _, none, dropping = rows(tmp_path)
    assert none[0] == "none" and none[4:8] == ["0.500", "2.00", "100.0", "100.0"]
    assert dropping[:2] == ["PyramidDrop", "1:0.5"] and dropping[4:8] == ["0.600", "1.20", "60.0", "62.5"]


def test_a_page_says_how_many_trainings_ran_at_the_same_time(tmp_path: Path) -> None:
    page = tmp_path / "tables/trainings.md"
    for number, minute in enumerate((0, 5, 20)):
        put(tmp_path, f"one{number}", 2.0, 0.5, minute, seed=number)
    assert main(["trainings", "--results", str(tmp_path)]) == 0
    assert "They ran one after the other." in page.read_text()
    put(tmp_path, "beside", 2.0, 0.5, 22, seed=3)
    assert main(["trainings", "--results", str(tmp_path)]) == 0
    assert "Up to 2 of them ran side by side." in page.read_text()


def test_other_data_and_other_steps_do_not_stand_in_one_grid(tmp_path: Path) -> None:
    put(tmp_path, "whole", 2.0, 0.5)
    put(tmp_path, "other", 1.0, 0.6, method="fastv", schedule="1:0.5", data_fingerprint="d" * 16)
    assert main(["trainings", "--results", str(tmp_path)]) == 0
    text = (tmp_path / "tables/trainings.md").read_text()
    assert text.count("## tiny, 30 steps of 2") == 2
    (fastv,) = [row for row in rows(tmp_path) if row[0] == "FastV"]
    assert fastv[6] == "–", "nothing to hold it against"


def test_unfinished_trainings_are_left_out_and_none_at_all_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trainings", "--results", str(tmp_path)]) == 1
    assert "no finished training" in capsys.readouterr().err
    put(tmp_path, "whole", 2.0, 0.5)
    put(tmp_path, "running", 2.0, 0.5, seed=1)
    path = tmp_path / "trainings/running/training.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "running"}))
    assert main(["trainings", "--results", str(tmp_path)]) == 0
    assert len(rows(tmp_path)) == 3
    path.write_text("{}")
    assert main(["trainings", "--results", str(tmp_path)]) == 1
    assert "is not a training record" in capsys.readouterr().err


def test_scores_are_pooled_over_seeds_and_held_against_the_models_of_the_same_seeds(tmp_path: Path) -> None:
    half = records.schedule_of("pyramiddrop", 0.5)
    averages: dict[tuple[str, str], list[float]] = {}
    for method, schedule in (("none", ""), ("pyramiddrop", str(half))):
        for seed in (0, 1, 2):
            name = f"{method}{seed}"
            put(tmp_path, name, 2.0, 0.5, method=method, schedule=schedule, positions="compact", seed=seed)
            for way in ("none", "pyramiddrop"):
                trained = {"model": name, "model_path": f"trainings/{name}/model"}
                run = records.make_record(way, 0.5, seed=seed, **trained)
                if (method, seed) == ("none", 2) and way == "pyramiddrop":
                    continue  # of this seed, the models cannot be held against each other
                folder = records.put(tmp_path, run, experiment="training")
                if method == "pyramiddrop":  # in every third sample right, whatever it did
                    for path in (folder / "samples").glob("*.jsonl"):
                        lines = [json.loads(line) for line in path.read_text().splitlines()]
                        for line in lines[::3]:
                            line["scores"]["acc"] = 1.0
                        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
                        acc = fmean(line["scores"]["acc"] for line in lines)
                        run.results[path.name.removesuffix(".jsonl")].scores["acc"].value = acc
                    run.write(folder)
                accs = [json.loads(line)["scores"]["acc"] for path in sorted((folder / "samples").glob("*.jsonl"))
                        for line in path.read_text().splitlines()]  # fmt: skip
                averages.setdefault((method, way), []).append(100 * fmean(accs))
    start = {}
    for way in ("none", "pyramiddrop"):  # the model that all began with
        run = records.make_record(way, 0.5, model="start", model_fingerprint="a" * 16)
        folder = records.put(tmp_path, run, experiment="training")
        start[way] = [json.loads(line)["scores"]["acc"] for path in sorted((folder / "samples").glob("*.jsonl"))
                      for line in path.read_text().splitlines()]  # fmt: skip
    assert main(["trainings", "--pdf", "--results", str(tmp_path)]) == 0
    assert (tmp_path / "figures/trainings.pdf").read_bytes().startswith(b"%PDF")
    text = (tmp_path / "tables/trainings.md").read_text()
    assert "what they score" in text and "**gain**" in text
    begun, plain, dropping = rows(tmp_path)[-3:]
    assert begun[0] == "not fine-tuned" and float(begun[3]) == pytest.approx(100 * fmean(start["none"]), abs=0.06)
    assert plain[:2] == ["none", "–"] and plain[2] == "3" and plain[5:] == ["–"] * 6
    assert float(plain[3]) == pytest.approx(fmean(averages["none", "none"]), abs=0.06)
    assert float(dropping[3]) == pytest.approx(fmean(averages["pyramiddrop", "none"]), abs=0.06)
    value, low, high = (float(word.strip("[],").replace("−", "-")) for word in dropping[5].split())
    assert value == pytest.approx(fmean(averages["pyramiddrop", "none"]) - fmean(averages["none", "none"]), abs=0.06)
    assert low < value < high
    assert float(dropping[7]) == pytest.approx(fmean(averages["none", "pyramiddrop"]), abs=0.06)
    gain = fmean(averages["pyramiddrop", "pyramiddrop"][:2]) - fmean(averages["none", "pyramiddrop"])
    assert float(dropping[8].split()[0].replace("−", "-")) == pytest.approx(gain, abs=0.06) and gain > 5
    assert float(dropping[9]) == pytest.approx(100 * fmean(start["pyramiddrop"]), abs=0.06)
    over = fmean(averages["pyramiddrop", "pyramiddrop"]) - 100 * fmean(start["pyramiddrop"])
    assert float(dropping[10].split()[0].replace("−", "-")) == pytest.approx(over, abs=0.06)


def test_models_that_answered_other_questions_or_twice_are_not_held_against_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = str(records.schedule_of("pyramiddrop", 0.5))
    for name, method, schedule in (("plain", "none", ""), ("one", "pyramiddrop", half)):
        put(tmp_path, name, 2.0, 0.5, method=method, schedule=schedule, positions="compact")
        trained = {"model": name, "model_path": f"trainings/{name}/model"}
        folder = records.put(tmp_path, records.make_record("none", 0.5, **trained), experiment="training")
    assert main(["trainings", "--results", str(tmp_path)]) == 0
    task = min((folder / "samples").glob("*.jsonl"))
    text = task.read_text()
    task.write_text(text.replace('"doc_id": "', '"doc_id": "9', 1).replace('"doc_id": 0', '"doc_id": 99', 1))
    assert text != task.read_text()
    assert main(["trainings", "--results", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert folder.name in said and "answered different samples: score them alike" in said
    task.write_text(text)
    twice = records.put(tmp_path, records.make_record("none", 0.5, batch_size=7, **trained), experiment="training")
    assert main(["trainings", "--results", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert folder.name in said and twice.name in said and "score one model in one way" in said


def test_what_varies_in_a_study_are_fields_of_a_training() -> None:
    assert set(TRAINING_VARIES) < {field.name for field in dataclasses.fields(TrainingSpec)}


def test_intervals_cover_the_choice_of_seeds() -> None:
    draws = np.zeros((4000, 3)) + [0.0, 0.1, 0.5]  # no doubt about images, much about seeds
    low, high = interval(over_seeds(draws))
    assert low == 0.0 and high == 0.5
    assert interval(over_seeds(draws[:, :1])) == (0.0, 0.0)


def test_trainings_with_other_positions_are_another_way(tmp_path: Path) -> None:
    half = str(records.schedule_of("pyramiddrop", 0.5))
    for name, method, schedule, positions in (
        ("plain", "none", "", "original"),
        ("one", "pyramiddrop", half, "compact"),
        ("two", "pyramiddrop", half, "original"),
    ):
        put(tmp_path, name, 2.0, 0.5, method=method, schedule=schedule, positions=positions)
        trained = {"model": name, "model_path": f"trainings/{name}/model"}
        records.put(tmp_path, records.make_record("none", 0.5, **trained), experiment="training")
    assert main(["trainings", "--results", str(tmp_path)]) == 0
    assert [row[0] for row in rows(tmp_path)[-3:]] == ["none", "PyramidDrop, compact", "PyramidDrop, original"]


def test_the_figure_shows_each_way_of_training_with_both_differences() -> None:
    gain = Estimate(0.05, 0.02, 0.07)
    found = [
        Outcome(START, 0, 0.82),
        Outcome(WHOLE, 3, 0.8),
        Outcome(Way("fastv", "2:0.5"), 1, 0.78, None, Estimate(-0.02, -0.03, 0.01), 0.6, 0.55, gain, 0.57),
        Outcome(Way("pyramiddrop", "3:0.5"), 3, 0.79, 0.01, Estimate(-0.01, -0.02, 0.0)),  # not scored dropping
    ]
    scores, differences = trained_figure.draw(found).axes
    assert [text.get_text() for text in scores.get_yticklabels()] == [
        "FastV, 1 seed\n2:0.5",
        "PyramidDrop, 3 seeds\n3:0.5",
    ]
    places = {line.get_label(): list(line.get_xdata()) for line in scores.lines}
    assert places["trained and scored whole, all seeds"] == pytest.approx([80, 80])
    assert places["not fine-tuned, scored whole"] == pytest.approx([82, 82])
    assert places["not fine-tuned, scored dropping"] == pytest.approx([57])
    assert places["trained dropping, scored whole"] == pytest.approx([78, 79])
    assert places["trained and scored dropping"] == pytest.approx([60])
    assert places["trained whole, scored dropping"] == pytest.approx([55])
    whole, dropping = differences.containers
    assert list(whole.lines[0].get_xdata()) == pytest.approx([-2, -1])
    assert list(dropping.lines[0].get_xdata()) == pytest.approx([5])
    (bars,) = dropping.lines[2]
    assert bars.get_segments()[0][:, 0] == pytest.approx([2, 7])
