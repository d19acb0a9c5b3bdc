"""Checks for a user's task YAML that lmms-eval would silently accept, or fail on after all questions."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pdrop.evaluation import task_index
from pdrop.evaluation.generation_arguments import read_config

TEXTS = (".py", ".json", ".jsonl", ".csv", ".txt", ".yaml")


def check_aggregations(names: Sequence[str], task_dirs: Sequence[str | Path] = ()) -> None:
    """Refuse an aggregation that lmms-eval lacks; it would only fail once every question is answered.

    Raises:
        ValueError: Naming task, metric and the nearest ones.
    """
    for name, paths in task_index.find(names, task_dirs).items():
        for path in paths:
            if task_index.is_shipped(path.parent):
                continue
            for metric in read_config(path).get("metric_list") or ():
                given = metric.get("aggregation") if isinstance(metric, Mapping) else None
                if isinstance(given, str) and given not in (known := aggregations()):
                    near = get_close_matches(given, known, 1)
                    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
                    raise ValueError(
                        f"task {name}: aggregation: {given} of {metric.get('metric')} is not known: {hint}"
                    )


@functools.cache
def aggregations() -> list[str]:
    """The aggregations that lmms-eval registers, read from its source: importing it takes 10 s."""
    text = (task_index.installed_folder().parent / "api" / "metrics.py").read_text(encoding="utf8")
    return sorted(set(re.findall(r"@register_aggregation\(\s*[\"'](\w+)[\"']", text)))


def not_utf8(folders: Iterable[Path]) -> list[str]:
    """Which texts in folders of tasks, their code and their data are not UTF-8: what reads them does not name them."""
    found = []
    for path in dict.fromkeys(path for folder in folders for path in task_index.files_of(folder)):
        if path.suffix not in TEXTS:
            continue
        try:
            path.read_text(encoding="utf8")
        except UnicodeDecodeError as error:
            found.append(
                f"{path} is not UTF-8 (byte {error.object[error.start]:#x} at {error.start}): save it as UTF-8"
            )
    return found


def check_target(task: Any) -> None:
    """Refuse a doc_to_target that names no column: lmms-eval would use the name itself as the right answer.

    Args:
        task: An lmms-eval task with its data loaded.

    Raises:
        ValueError: Naming the existing columns.
    """
    config, columns = task.config, list(task.eval_docs.column_names)
    target = config.doc_to_target
    if config.process_results is not None or not isinstance(target, str) or not target.isidentifier():
        return
    if target not in columns:
        near = get_close_matches(target, columns, 1)
        hint = f", did you mean {near[0]}?" if near else ";"
        raise ValueError(
            f"task {config.task}: doc_to_target: {target} is no column{hint} There are {', '.join(columns)}"
        )
