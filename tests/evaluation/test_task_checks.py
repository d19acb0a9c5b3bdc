"""Tasks of one's own that lmms-eval would take without a word, or fail on after all questions."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from pdrop.evaluation import task_index
from pdrop.evaluation.lmms import check_data
from pdrop.evaluation.task_checks import aggregations, check_aggregations, check_target, not_utf8

TASK = "task: mine\ndataset_path: parquet\nmetric_list:\n  - {metric: exact_match, aggregation: %s}\n"


def test_aggregations_are_held_against_those_of_lmms_eval(tmp_path: Path) -> None:
    assert {"mean", "median"} <= set(aggregations())
    (tmp_path / "mine.yaml").write_text(TASK % "mean")
    check_aggregations(["mine"], [tmp_path])
    (tmp_path / "mine.yaml").write_text(TASK % "!function own.mean")
    check_aggregations(["mine"], [tmp_path])
    (tmp_path / "mine.yaml").write_text(TASK % "meen")
    with pytest.raises(ValueError, match=r"mine: aggregation: meen of exact_match is not known: did you mean mean"):
        check_aggregations(["mine"], [tmp_path])


def test_two_files_of_one_name_are_refused_where_it_is_asked_for(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(TASK % "mean")
    (tmp_path / "other.yaml").write_text("task: other\n")
    task_index.find(["other"], [tmp_path])
    with pytest.raises(ValueError, match=r"'mine' is defined in .*one.yaml and .*two.yaml: rename one"):
        task_index.find(["mine"], [tmp_path])


def test_files_that_include_each_other_are_named(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("task: one\ninclude: one.yaml\n")
    with pytest.raises(ValueError, match=r"one.yaml includes itself"):
        task_index.find(["one"], [tmp_path])
    (tmp_path / "one.yaml").write_text("task: one\ninclude: two.yaml\n")
    (tmp_path / "two.yaml").write_text("include: one.yaml\n")
    with pytest.raises(ValueError, match=r"includes itself"):
        task_index.find(["one"], [tmp_path])


@pytest.mark.parametrize(
    ("target", "results", "refused"),
    [("answer", None, False), ("answr", None, True), ("{{answr}}", None, False), ("answr", print, False)],
)
def test_a_target_is_a_column_a_template_or_not_asked_for(target: str, results: Any, refused: bool) -> None:
    docs = datasets.Dataset.from_dict({"question": ["?"], "answer": ["!"]})
    task = SimpleNamespace(
        config=SimpleNamespace(task="mine", doc_to_target=target, process_results=results), eval_docs=docs
    )
    if not refused:
        check_target(task)
        return
    with pytest.raises(ValueError, match=r"doc_to_target: answr is no column, did you mean answer.*question, answer"):
        check_target(task)


def test_texts_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    data, text = tmp_path / "data/questions.jsonl", "dataset_path: json\ndataset_kwargs: {data_files: {test: %s}}\n"
    data.parent.mkdir()
    data.write_bytes(b'{"question": "caf\xe9", "answer": "yes"}\n')
    lines = "task: mine\ntest_split: test\noutput_type: generate_until\ndoc_to_text: question\ndoc_to_target: answer\n"
    (tmp_path / "mine.yaml").write_text(lines + text % data)
    told = f"{data} is not UTF-8 (byte 0xe9 at 17): save it as UTF-8"
    assert not_utf8([tmp_path]) == [told]
    with pytest.raises(ValueError, match="task mine: its data cannot be loaded: UnicodeDecodeError") as error:
        check_data(("mine",), (str(tmp_path),), "")
    assert str(error.value).endswith(f"; {told}")
    (tmp_path / "mine.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "mine.png").write_bytes(b"\x89PNG\xe9")
    assert not_utf8([tmp_path, tmp_path]) == [
        told,
        f"{tmp_path}/mine.py is not UTF-8 (byte 0xe9 at 5): save it as UTF-8",
    ]
