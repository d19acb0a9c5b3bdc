"""Converts lmms-eval's output for a task to our results and per-sample lines. No torch, no lmms-eval.

A sample, which pdrop/samples.py keeps on disk:

    doc_id, question, prompt, target, answer    what was asked, rendered, expected and given
    scores       {metric: number}, one entry for each metric that a single sample has a number for
    metrics      {metric: the input of the task's aggregation}
    visual_tokens, visual_per_layer, kept, kept_counts     for the first request; `kept` as in answers.py
    image        shared by samples about the same picture (its id, or a hash), for statistics by cluster
    layout       where the visual tokens are in the pictures (pictures.py); null if that is not known
    attention    the query tokens' attention if layers rank but nothing is dropped (pdrop/evaluation/answers.py)
    losses       of the choices, if the task compares likelihoods
    parts        {metric: [numerator, denominator, stratum]} for scores that are not a plain mean (metrics.py)
    read         what the task's rule reads in the answer; null if the answer is invalid (readings.py)
    group        shared by samples that are scored together: a pair, a question's rotations
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from statistics import fmean
from typing import Any

from pdrop.evaluation.answers import Answer, unpack
from pdrop.evaluation.documents import Documents
from pdrop.evaluation.grounding import asks_boxes, box_scores
from pdrop.evaluation.metrics import Metric, circles, decomposed, near, score_of
from pdrop.evaluation.official import official
from pdrop.evaluation.readings import UNREADABLE, readings
from pdrop.record import Score, TaskResult
from pdrop.shapes import PromptSize

log = logging.getLogger(__name__)

# fields of a logged sample other than its metrics
BOOKKEEPING = {
    *("doc_id", "doc", "doc_hash", "target", "arguments", "input_media"),
    *("resps", "filtered_resps", "raw_filtered_resps", "token_counts"),
}
CORRECTED = ("pope_precision", "pope_recall", "pope_f1_score", "pope_yes_ratio", "ocrbench_accuracy")
# the metric that papers report, if it is not the first in the task's list
REPORTED = {"pope_f1_score", "seed_image", "average"}


@dataclass(frozen=True)
class Rules:
    """The parts of a task's own code from which the parts of its scores are found.

    Attributes:
        aggregate: (metric, entries) -> the score; raises if these entries alone cannot be aggregated.
        choice: Whether an entry of MMBench's metric is right by the task's rule.
    """

    aggregate: Callable[[str, list[Any]], Any]
    choice: Callable[[Mapping[str, Any]], bool]


@dataclass
class Evaluation:
    """Scores of every task, sizes of the prompts, how many requests were asked or already answered, and who answered
    them (see pdrop.evaluation.answers.answered_by)."""

    results: dict[str, TaskResult] = field(default_factory=dict)
    prompts: list[PromptSize] = field(default_factory=list)
    asked: int = 0
    reused: int = 0
    answered_by: list[dict[str, Any]] = field(default_factory=list)


def task_result(
    output: Mapping[str, Any],
    name: str,
    documents: Documents,
    answers: Mapping[tuple[int, int], Answer],
    rules: Rules,
    rows: Sequence[int] | None = None,
    boxes: str | None = None,
) -> tuple[TaskResult, list[dict[str, Any]]]:
    """The result of one task and its samples by doc_id.

    Args:
        output: What `simple_evaluate` returned.
        name: The task.
        documents: Its documents.
        answers: Answers by doc_id and number of the request.
        rules: The rules of the task's code.
        rows: The documents that were asked; None: all, or the first ones.
        boxes: The family whose prompt for boxes was used, if the task asks for boxes.

    Raises:
        RuntimeError: If the task has no score that can be computed here.
    """
    logged = {sample["doc_id"]: sample for sample in reversed(output["samples"][name])}
    ordered = [logged[place] for place in sorted(logged)]
    numbers = [place if rows is None else rows[place] for place in sorted(logged)]
    metrics, higher = scored(output, name, ordered, rules)
    if not metrics:
        raise RuntimeError(
            f"task {name}: no score can be computed here (its answers go to a server or a judge); "
            "choose a task that is scored locally"
        )
    config = output["configs"][name]
    order = [entry["metric"] for entry in config.get("metric_list") or () if isinstance(entry["metric"], str)]
    first = [metric for metric in order if metric in metrics] or list(metrics)
    main = next((metric for metric in first if metric in REPORTED), first[0])
    by_rule = official(name, ordered)
    if boxes is not None and asks_boxes(name):
        found = box_scores(ordered, [answers[number, 0] for number in numbers], boxes)
        unread = found["unreadable"].numbers
        ordered = [{**one, UNREADABLE: place} for one, place in zip(ordered, unread)]
        metrics, main = found, "acc_0.5"
    every = metrics | {metric: found for metric, found in by_rule.items() if metric not in metrics}
    samples = [_sample(one, number, documents, answers) for one, number in zip(ordered, numbers)]
    generated = all(sample["answer"] is not None for sample in samples)
    read = readings(ordered) if generated else []
    for place, sample in enumerate(samples):
        numbered = {metric: found.numbers[place] for metric, found in every.items()}
        sample["scores"] |= {metric: number for metric, number in numbered.items() if number is not None}
        parted = {metric: found.parts[place] for metric, found in every.items() if found.parts is not None}
        if parts := {metric: part for metric, part in parted.items() if part is not None}:
            sample["parts"] = parts
        if generated:
            sample["read"] = read[place]
    result = TaskResult(
        scores={
            m: Score(found.value, found.n, higher.get(m, True), found.full, is_mean(found))
            for m, found in every.items()
        },
        n=len(samples),
        n_total=len(documents),
        version=_version(config.get("metadata")),
        data_hash=_hash(documents.data(sample["doc_id"]) for sample in samples),
        prompt_hash=_hash(answers[key].prompt for key in sorted(answers)),
        main_metric=main,
        invalid=sum(one is None for one in read) if generated else 0,
        boxes=boxes if asks_boxes(name) else None,
    )
    return result, samples


def is_mean(found: Metric) -> bool:
    """Whether a score is the plain mean of its samples' own numbers."""
    known = [number for number in found.numbers if number is not None]
    return found.parts is None and bool(known) and math.isclose(fmean(known), found.value, rel_tol=1e-9, abs_tol=1e-12)


def _sample(
    logged: Mapping[str, Any], doc_id: int, documents: Documents, answers: Mapping[tuple[int, int], Answer]
) -> dict[str, Any]:
    given = [answer for (document, _), answer in sorted(answers.items()) if document == doc_id]
    metrics = {key: value for key, value in logged.items() if key not in BOOKKEEPING}
    sample = {
        "doc_id": doc_id,
        "question": next((a for a in logged["arguments"] if isinstance(a, str)), ""),
        "prompt": given[0].prompt,
        "target": logged["target"],
        "answer": logged["filtered_resps"][0] if len(given) == 1 else [answer.text for answer in given],
        "scores": {},
        "metrics": metrics,
        "visual_tokens": given[0].visual_tokens,
        "visual_per_layer": given[0].visual_per_layer,
        "kept": given[0].kept,
        "kept_counts": [len(unpack(mask)) for mask in given[0].kept],
        "image": documents.image_group(doc_id),
        "layout": given[0].layout,
    }
    if (group := documents.group(doc_id)) is not None:
        sample["group"] = group
    if given[0].attention is not None:
        sample["attention"] = given[0].attention
    if given[0].loss is not None:
        sample["answer"], sample["losses"] = None, [answer.loss for answer in given]
    return sample


def scored(
    output: Mapping[str, Any], name: str, samples: Sequence[Mapping[str, Any]], rules: Rules
) -> tuple[dict[str, Metric], dict[str, bool]]:
    """lmms-eval's own scores of a task with their parts, and for each whether higher is better."""
    found: dict[str, Metric] = {}
    higher: dict[str, bool] = {}
    for key, value in output["results"][name].items():
        metric, _, which = key.partition(",")  # the task's filter that the answers went through, usually there is one
        if not which or "_stderr" in metric or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if not math.isfinite(value):
            log.warning("task %s: metric %s is %s over these samples and is left out", name, metric, value)
            continue
        named = key if metric in found else metric
        higher[named] = output["higher_is_better"][name].get(metric) is not False
        found[named] = made_of(metric, float(value), samples, rules)
    return found, higher


def made_of(metric: str, value: float, samples: Sequence[Mapping[str, Any]], rules: Rules) -> Metric:
    """One of lmms-eval's scores with its parts."""
    entries = [sample.get(metric) for sample in samples]
    whole = [entry for entry in entries if isinstance(entry, Mapping)]
    if metric == "gpt_eval_score" and len(whole) == len(entries) and all({"index", "A"} <= set(e) for e in whole):
        right = [rules.choice(entry) for entry in whole]
        parts = circles(whole, right, 100.0)
        return Metric(value, [float(one) for one in right], parts if near(score_of(parts), value) else None, 100.0)
    needed = {"score"} if metric == "ocrbench_accuracy" else {"prediction", "ground_truth"}
    if metric in CORRECTED and whole and all(needed <= set(entry) for entry in whole):
        value = corrected(metric, whole)
    return decomposed(metric, value, entries, lambda those: rules.aggregate(metric, those))


def corrected(metric: str, entries: Sequence[Mapping[str, Any]]) -> float:
    """POPE's precision, recall, F1 and ratio of yes (arXiv 2305.10355) and OCRBench's accuracy, recomputed.

    lmms-eval 0.7.3 leaves answers that are neither yes nor no out of the recall, counts the yes of the ground truth
    instead of the answers', and sums OCRBench's points over all runs of a process, out of 1000 however many questions
    were asked.
    """
    if metric == "ocrbench_accuracy":
        return sum(float(entry["score"]) for entry in entries) / len(entries)
    said = sum(entry["prediction"] == "yes" for entry in entries)
    true = sum(entry["ground_truth"] == "yes" for entry in entries)
    hit = sum(entry["prediction"] == entry["ground_truth"] == "yes" for entry in entries)
    values = {
        "pope_precision": hit / said if said else 0.0,
        "pope_recall": hit / true if true else 0.0,
        "pope_f1_score": 2 * hit / (said + true) if said + true else 0.0,
        "pope_yes_ratio": said / len(entries),
    }
    return float(values[metric])


def _version(metadata: Any) -> str:
    entries = metadata if isinstance(metadata, list) else [metadata]
    versions = [str(entry["version"]) for entry in entries if isinstance(entry, Mapping) and "version" in entry]
    return ", ".join(versions) or f"of lmms-eval {version('lmms-eval')}"


def _hash(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]
