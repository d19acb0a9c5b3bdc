"""What the task files of this folder refer to: which rows are a family's, the prompt, and POPE's F1.

Answers are scored by lmms-eval's own exact_match, case and punctuation ignored; F1 follows its task "pope".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def _rows_of(family: str) -> Callable[[Any], Any]:
    """A function from the whole test split (a datasets.Dataset) to the rows of one family."""

    def select(dataset: Any) -> Any:
        found = [row for row, name in enumerate(dataset["family"]) if name == family]
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
    return dataset.select([row for row, name in enumerate(dataset["family"]) if name in ASKED])


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


def _plain(answer: str) -> str:
    """Lower case, without punctuation and blanks around."""
    return "".join(letter for letter in answer.lower() if letter.isalnum() or letter == " ").strip()


def existence_results(row: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Exact match (0 or 1) and what F1 needs: (predicted, true)."""
    predicted, true = _plain(results[0]), row["answer"]
    return {"exact_match": float(predicted == true), "f1": (predicted, true)}


def f1(pairs: Sequence[tuple[str, str]]) -> float:
    """F1 of the answer "yes", as in POPE; 0 where precision and recall are 0."""
    hits = sum(predicted == true == "yes" for predicted, true in pairs)
    said = sum(predicted == "yes" for predicted, _ in pairs)
    meant = sum(true == "yes" for _, true in pairs)
    return 2 * hits / (said + meant) if said + meant else 0.0
