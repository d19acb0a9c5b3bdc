"""Stored answers scored anew: python -m pdrop rescore, with the task's present code and without a model."""

import sys
from pathlib import Path

import pytest
import yaml

from pdrop.cli import run as command
from pdrop.record import RunRecord
from pdrop.runs.rescore import folders_of, rescore
from pdrop.samples import read_samples
from pdrop.store import write_atomically
from tests.support.answering import scored, spec
from tests.support.synthetic_tasks import write_tasks

TEXTS = ("yes.",)


@pytest.fixture
def store(tmp_path):
    """A store with one finished run of gqa and pope."""
    tasks, names = write_tasks(tmp_path, ["gqa", "pope"]), ("gqa", "pope")
    run = spec(names)
    folder = tmp_path / "results" / "runs" / run.folder
    evaluation = scored(folder, names, tasks, TEXTS)
    RunRecord(run, "done", "2026-01-02T03:04:05Z", 3.0, None, evaluation.results).write(folder)
    return tmp_path / "results", folder, tasks


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["pdrop", "rescore", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        command.main()
    return ended.value.code


def stricter(tasks: Path) -> None:
    """The task's rule is another one now: exact_match with punctuation."""
    path = tasks / "gqa.yaml"
    metric = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True}
    write_atomically(path, yaml.safe_dump(yaml.safe_load(path.read_text()) | {"metric_list": [metric]}))


def test_another_rule_gives_other_scores_of_the_same_answers(store, monkeypatch, capsys):
    results, folder, tasks = store
    before, answers = RunRecord.read(folder), (folder / "answers.jsonl").read_bytes()
    arguments = ("--results", results, "--task-folder", tasks)
    assert call(monkeypatch, *arguments) == 0
    assert "scored anew, no score differs" in capsys.readouterr().out
    same = RunRecord.read(folder)
    assert same.results == before.results and len(same.rescored) == 1
    stricter(tasks)
    samples = (folder / "samples.zip").read_bytes()
    assert call(monkeypatch, before.run_id[:6], "--check", *arguments) == 0
    assert "would change, 1 score differs\n  gqa exact_match: " in capsys.readouterr().out
    assert RunRecord.read(folder) == same and (folder / "samples.zip").read_bytes() == samples, "nothing was written"
    assert call(monkeypatch, folder.name, *arguments) == 0
    after = RunRecord.read(folder)
    old, new = (record.results["gqa"].scores["exact_match"].value for record in (before, after))
    assert new < old and after.run_id == before.run_id
    assert after.rescored[-1]["before"]["gqa"]["exact_match"] == old, "what was replaced is not lost"
    assert after.rescored[-1]["versions"]["lmms-eval"] and after.rescored[-1]["sources"]
    right = [sample["scores"]["exact_match"] for sample in read_samples(folder, "gqa")]
    assert sum(right) / len(right) == new and (folder / "answers.jsonl").read_bytes() == answers
    assert after.results["pope"] == before.results["pope"]


def test_other_questions_and_missing_answers_are_refused(store, monkeypatch, capsys):
    results, folder, tasks = store
    record = (folder / "record.json").read_bytes()
    path = tasks / "pope.yaml"
    asks = {"default": {"pre_prompt": "Look. ", "post_prompt": ""}}
    write_atomically(path, yaml.safe_dump(yaml.safe_load(path.read_text()) | {"lmms_eval_specific_kwargs": asks}))
    arguments = ("--results", results, "--task-folder", tasks)
    assert call(monkeypatch, *arguments) == 1
    told = capsys.readouterr().err
    assert "task pope now asks document 0 something that was not answered (8 of 8 in all)" in told
    (folder / "answers.jsonl").unlink()
    assert call(monkeypatch, *arguments) == 1
    assert "its answers are not here" in capsys.readouterr().err
    assert call(monkeypatch, "nothing", *arguments) == 1
    assert "'nothing' names 0 runs" in capsys.readouterr().err
    assert call(monkeypatch, "--results", tasks) == 1
    assert "no run under" in capsys.readouterr().err
    assert (folder / "record.json").read_bytes() == record
    failed = RunRecord.read(folder)
    failed.status = "failed"
    failed.write(folder)
    with pytest.raises(ValueError, match=r"has no scores \(failed\)"):
        rescore(folder)


def test_tasks_of_ones_own_are_found_by_the_command_that_made_the_run():
    record = RunRecord(spec(["gqa"]), "done", "2026-01-02T03:04:05Z")
    record.command = ["run.py", "task_folders=[my/tasks,'/other/one']", "tasks=gqa"]
    assert folders_of(record) == ["my/tasks", "/other/one"]
    record.command = ["run.py", "tasks=gqa"]
    assert folders_of(record) == []
