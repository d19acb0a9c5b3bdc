"""The benchmarks' own scoring rules where lmms-eval's differ; their metrics have names of their own.

    POPE            official_f1, official_accuracy, official_yes_ratio      an answer is no if No, no or not is a word
                    of its first sentence, else yes; F1 is the mean over the categories (LLaVA's eval_pope.py)
    ScienceQA       official_accuracy       the letter, "X. ...", or "The answer is X." (LLaVA's eval_science_qa.py)
    GQA             official_accuracy       equal after lower case and without a full stop at the end (LLaVA's
                    convert_gqa_for_eval.py, GQA's eval.py)
    MMBench         circular_accuracy, single_pass_accuracy     a letter or an option's text, read by rule (VLMEvalKit's
                    matching_util.py); an answer that no rule reads is wrong, while the official tool asks a judge
    MME             mme_total_score         perception and cognition together

Under protocol=official tables show these scores (MAIN) and lmms-eval's are recorded in addition; under other protocols
it is the reverse. lmms-eval 0.7.3 counts POPE's and ScienceQA's answers as wrong unless they are only the word or
letter, and GQA's as right after removing punctuation. No torch, no lmms-eval.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pdrop.evaluation.documents import CIRCLE
from pdrop.evaluation.metrics import YES_NO, Metric, Part, circles, pairs, score_of, yes_no_part

LETTERS = "ABCDEFGH"
BLANKS = str.maketrans(".()[],:;!*#{}", " " * 13)
# by the beginning of a task's name; for MME papers print perception, which is lmms-eval's own main score
MAIN = {
    "pope": "official_f1",
    "scienceqa": "official_accuracy",
    "gqa": "official_accuracy",
    "mmbench": "circular_accuracy",
}
Samples = Sequence[Mapping[str, Any]]  # as lmms-eval logs them: doc, target, filtered_resps and the metrics


def official(task: str, samples: Samples) -> dict[str, Metric]:
    """The scores by the official rules; empty for tasks that lmms-eval scores by the official rule.

    Args:
        task: lmms-eval's name, or one that begins with it.
        samples: In order.
    """
    found: dict[str, Metric] = {}
    if task.startswith("pope") and all("pope_f1_score" in sample for sample in samples):
        found = pope(samples)
    elif task.startswith("scienceqa"):
        found = {"official_accuracy": share(science_qa(said(s), str(s["target"])) for s in samples)}
    elif task.startswith("gqa"):
        found = {"official_accuracy": share(gqa(said(s), str(s["target"])) for s in samples)}
    elif task.startswith("mmbench") and all({"index", "A", "answer"} <= set(s["doc"]) for s in samples):
        found = mmbench(samples)
    elif task.startswith("mme"):
        found = mme(samples)
    return found


def main_metric(task: str, scores: Iterable[str]) -> str | None:
    """The official score that published tables print for a task; None if it is lmms-eval's own.

    Args:
        task: Its name.
        scores: Names of the scores found for it.
    """
    there = [*scores]
    return next((metric for start, metric in MAIN.items() if task.startswith(start) and metric in there), None)


def said(sample: Mapping[str, Any]) -> str:
    """The answer after the task's filters."""
    return str(sample["filtered_resps"][0])


def share(right: Iterable[bool | float | None]) -> Metric:
    """The share of right answers."""
    numbers = [float(bool(one)) for one in right]
    return Metric(sum(numbers) / len(numbers), [*numbers], full=1.0)


def pope(samples: Samples) -> dict[str, Metric]:
    """F1 (the mean over POPE's categories), accuracy and ratio of yes."""
    strata = [str(sample["doc"].get("category", "")) for sample in samples]
    answers = [yes_or_no(said(sample)) for sample in samples]
    truths = [str(sample["target"]).strip().lower() for sample in samples]
    right: list[float | None] = [float(answer == truth) for answer, truth in zip(answers, truths)]
    found = {"official_accuracy": share(right)}
    for kind in YES_NO[0], YES_NO[-1]:
        categories = strata if kind == "f1" else [""] * len(samples)
        each = 1 / len(set(categories))
        parts: list[Part | None] = [yes_no_part(kind, *one, each) for one in zip(answers, truths, categories)]
        found[f"official_{kind}"] = Metric(score_of(parts), list(right), parts, 1.0)
    return found


def yes_or_no(answer: str) -> str:
    """POPE's rule: the first sentence without commas is no if No, no or not is one of its words, otherwise yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def science_qa(answer: str, target: str) -> bool:
    """Whether an answer is the target's letter: alone, before a full stop and a blank, or after "The answer is"."""
    letter = answer.strip()
    if len(letter) != 1 and letter[1:3] != ". ":
        found: list[str] = re.findall(r"The answer is ([A-Z])\.", letter)
        letter = found[0] if len(found) == 1 else ""
    return letter[:1] == target.strip()


def gqa(answer: str, target: str) -> bool:
    return answer.strip().rstrip(".").lower() == target


def mmbench(samples: Samples) -> dict[str, Metric]:
    """The share of questions with all rotations right, and of those with the first row right."""
    docs = [sample["doc"] for sample in samples]
    right = [option(said(s), options_of(s["doc"])) == str(s["doc"]["answer"]) for s in samples]
    first: list[Part | None] = [
        (float(one), 1.0, "") if int(doc["index"]) < CIRCLE else (0.0, 0.0, "") for doc, one in zip(docs, right)
    ]
    numbers: list[float | None] = [float(one) for one in right]
    found = {"circular_accuracy": circles(docs, right), "single_pass_accuracy": first}
    return {name: Metric(score_of(parts), [*numbers], parts, 1.0) for name, parts in found.items()}


def option(answer: str, options: Mapping[str, str]) -> str:
    """VLMEvalKit's rule: the one letter that is a word of the answer, near its end, else the one option in it.

    Returns:
        The letter; "" if there is none, or more than one.
    """
    words = answer.translate(BLANKS).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
        return letters[0]
    text = answer.lower()
    if len(text) > 2 * sum(map(len, options.values())):
        return ""
    named = [letter for letter, option in options.items() if option.lower() in text]
    return named[0] if len(named) == 1 else ""


def options_of(doc: Mapping[str, Any]) -> dict[str, str]:
    """The options of a document that has a column per letter, or a list of options; empty if it has neither."""
    listed = next((doc[name] for name in ("options", "choices", "candidates", "option") if name in doc), None)
    if isinstance(listed, list) and all(isinstance(option, str) for option in listed):
        return dict(zip(LETTERS, listed))
    columns = {letter: doc.get(letter, doc.get(f"choice_{letter.lower()}")) for letter in LETTERS}
    return {letter: str(text) for letter, text in columns.items() if text is not None and str(text) != "nan"}


def mme(samples: Samples) -> dict[str, Metric]:
    """Perception and cognition together; empty if a task asks for only one of them."""
    names = ("mme_perception_score", "mme_cognition_score")
    entries = [sample[name] for sample in samples for name in names if name in sample]
    parts, full = pairs(entries)
    if parts is None or len(entries) < len(samples):
        return {}
    return {"mme_total_score": Metric(score_of(parts), [float(e["score"]) for e in entries], parts, full)}
