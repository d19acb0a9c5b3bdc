"""What the task files of this folder refer to: which rows are a family's, the prompt, and POPE's scores.

All scores are lmms-eval's own code: exact_match with case and punctuation ignored, for existence that of its task
"pope", for documents ANLS beside it, as in DocVQA. (ChartQA's tolerance of 5 % lets no whole number to 9 pass for
another, so for charts exact_match is the same.) It is imported where it is called: by then pdrop.evaluation.lmms has
imported lmms-eval and undone what that does to the process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def _rows_of(family: str) -> Callable[[Any], Any]:
    """A function from the whole test split (a datasets.Dataset) to the rows of one family."""

    def select(dataset: Any) -> Any:
        found = [row for row, name in enumerate(dataset["family"][:]) if name == family]
        if not found:
            raise ValueError(f"the test split has no question of the family {family!r}")
        return dataset.select(found)

    return select


existence = _rows_of("existence")
attribute = _rows_of("attribute")
relation = _rows_of("relation")
position = _rows_of("position")
counting = _rows_of("counting")
reading = _rows_of("reading")
document = _rows_of("document")
chart = _rows_of("chart")
choice = _rows_of("choice")
multihop = _rows_of("multihop")


CLIP = 4  # frames
ASKED = ("existence", "attribute", "counting", "chart")  # families that a clip is asked about


def video(dataset: Any) -> Any:
    """The rows that still clips are asked about."""
    return dataset.select([row for row, name in enumerate(dataset["family"][:]) if name in ASKED])


def clip(row: dict[str, Any]) -> list[Any]:
    """The row's image as a still clip: the same frame CLIP times."""
    return visual(row) * CLIP


def visual(row: dict[str, Any]) -> list[Any]:
    """The row's image, as a list of one PIL image."""
    return [row["image"].convert("RGB")]


def text(row: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """The prompt: the question between the task's pre_prompt and post_prompt."""
    around = lmms_eval_specific_kwargs or {}
    return f"{around.get('pre_prompt', '')}{row['question']}{around.get('post_prompt', '')}"


def existence_results(row: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Exact match (0 or 1) and what F1 needs, by the code of lmms-eval's task "pope"; a final full stop is forgiven."""
    from lmms_eval.tasks.pope.utils import pope_process_results

    scored = pope_process_results(row, [results[0].strip().rstrip(".")])
    return {"exact_match": scored["pope_accuracy"]["score"], "f1": scored["pope_f1_score"]}


def f1(scored: Sequence[dict[str, Any]]) -> float:
    """F1 of the answer "yes", by the code of lmms-eval's task "pope"; 0 where precision and recall are 0."""
    from lmms_eval.tasks.pope.utils import pope_aggregate_f1_score

    return float(pope_aggregate_f1_score(scored))
