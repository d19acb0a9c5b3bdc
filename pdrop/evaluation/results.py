"""From what lmms-eval returns for a task to our results and per-sample lines. No torch, no lmms-eval.

A sample, which pdrop/samples.py keeps on disk:

    doc_id, question, prompt, target, answer    what was asked, rendered, expected and given
    scores       {metric: number}, one entry for each metric that a single sample has a number for
    metrics      {metric: whatever the task's aggregation works on}
    visual_tokens, visual_per_layer, kept, kept_counts     of the first request; `kept` as in answers.py
    image        what samples about the same picture share (its id, or a hash), for statistics by cluster
    layout       where the visual tokens lie in the pictures (pictures.py); null where that is not known
    attention    where nothing is dropped but layers rank: what the query tokens attend to (pdrop/evaluation/answers.py)
    losses       of the choices, where the task compares likelihoods
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from pdrop.evaluation.answers import Answer, unpack
from pdrop.evaluation.documents import Documents
from pdrop.record import Score, TaskResult
from pdrop.shapes import PromptSize

log = logging.getLogger(__name__)

# what is in a logged sample besides its metrics
BOOKKEEPING = {
    *("doc_id", "doc", "doc_hash", "target", "arguments", "input_media"),
    *("resps", "filtered_resps", "raw_filtered_resps", "token_counts"),
}
# the metric that papers report, where it is not the first one of the task's list
REPORTED = {"pope_f1_score", "seed_image", "average"}


@dataclass
class Evaluation:
    """Scores of every task, what each prompt looked like, how many requests were asked or found answered, and who
    answered them (see pdrop.evaluation.answers.answered_by)."""

    results: dict[str, TaskResult] = field(default_factory=dict)
    prompts: list[PromptSize] = field(default_factory=list)
    asked: int = 0
    reused: int = 0
    answered_by: list[dict[str, Any]] = field(default_factory=list)


def task_result(
    output: Mapping[str, Any], name: str, documents: Documents, answers: Mapping[tuple[int, int], Answer]
) -> tuple[TaskResult, list[dict[str, Any]]]:
    """The result of one task and its samples by doc_id.

    Args:
        output: What `simple_evaluate` returned.
        name: The task.
        documents: Its documents.
        answers: By doc_id and number of the request.

    Raises:
        RuntimeError: If the task has no score that can be computed here.
    """
    logged = {sample["doc_id"]: sample for sample in reversed(output["samples"][name])}
    samples = [_sample(logged[doc_id], documents, answers) for doc_id in sorted(logged)]
    scores = _scores(output, name, samples)
    scores |= _yes_no(name, scores, samples)
    if not scores:
        raise RuntimeError(
            f"task {name}: no score can be computed here (its answers go to a server or a judge); "
            "choose a task that is scored locally"
        )
    config = output["configs"][name]
    order = [entry["metric"] for entry in config.get("metric_list") or () if isinstance(entry["metric"], str)]
    first = [metric for metric in order if metric in scores] or list(scores)
    result = TaskResult(
        scores=scores,
        n=len(samples),
        n_total=len(documents),
        version=_version(config.get("metadata")),
        data_hash=_hash(documents.data(sample["doc_id"]) for sample in samples),
        prompt_hash=_hash(answers[key].prompt for key in sorted(answers)),
        main_metric=next((metric for metric in first if metric in REPORTED), first[0]),
    )
    return result, samples


def _sample(
    logged: Mapping[str, Any], documents: Documents, answers: Mapping[tuple[int, int], Answer]
) -> dict[str, Any]:
    doc_id = logged["doc_id"]
    given = [answer for (document, _), answer in sorted(answers.items()) if document == doc_id]
    metrics = {key: value for key, value in logged.items() if key not in BOOKKEEPING}
    numbers = {key: _number(value) for key, value in metrics.items()}
    sample = {
        "doc_id": doc_id,
        "question": next((a for a in logged["arguments"] if isinstance(a, str)), ""),
        "prompt": given[0].prompt,
        "target": logged["target"],
        "answer": logged["filtered_resps"][0] if len(given) == 1 else [answer.text for answer in given],
        "scores": {key: number for key, number in numbers.items() if number is not None},
        "metrics": metrics,
        "visual_tokens": given[0].visual_tokens,
        "visual_per_layer": given[0].visual_per_layer,
        "kept": given[0].kept,
        "kept_counts": [len(unpack(mask)) for mask in given[0].kept],
        "image": documents.image_group(doc_id),
        "layout": given[0].layout,
    }
    if given[0].attention is not None:
        sample["attention"] = given[0].attention
    if given[0].loss is not None:
        sample["answer"], sample["losses"] = None, [answer.loss for answer in given]
    return sample


def _number(value: Any) -> float | None:
    """The number a metric has for one sample: itself, its field `score`, or whether prediction and answer agree.

    Whether the task's score is the mean of these numbers (POPE's F1 and MME's sum are not) is for the reader to check.
    """
    if isinstance(value, Mapping):
        if "score" not in value and {"pred", "answer"} <= set(value):  # SEED-Bench
            return float(str(value["pred"]).strip().lower() == str(value["answer"]).strip().lower())
        value = value.get("score")
    if isinstance(value, (bool, int, float)) and math.isfinite(value):
        return float(value)
    return None


def _scores(output: Mapping[str, Any], name: str, samples: Sequence[Mapping[str, Any]]) -> dict[str, Score]:
    scores: dict[str, Score] = {}
    for key, value in output["results"][name].items():
        metric, _, which = key.partition(",")  # which of the task's filters the answers went through, usually one
        if not which or "_stderr" in metric or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if not math.isfinite(value):
            log.warning("task %s: metric %s is %s over these samples and is left out", name, metric, value)
            continue
        n = sum(1 for sample in samples if metric in sample["metrics"])
        higher = output["higher_is_better"][name].get(metric)
        scores[key if metric in scores else metric] = Score(float(value), n, higher is not False)
    return scores


def _yes_no(name: str, scores: Mapping[str, Score], samples: Sequence[Mapping[str, Any]]) -> dict[str, Score]:
    """POPE's recall, F1 and yes-ratio (arXiv 2305.10355), recomputed.

    lmms-eval 0.7.3 leaves answers that are neither yes nor no out of the recall, and counts the yes of the ground
    truth instead of the answers'.
    """
    if "pope_f1_score" not in scores:
        return {}
    pairs = [
        (s["metrics"]["pope_f1_score"]["prediction"], s["metrics"]["pope_f1_score"]["ground_truth"]) for s in samples
    ]
    said = sum(answer == "yes" for answer, _ in pairs)
    true = sum(truth == "yes" for _, truth in pairs)
    hit = sum(answer == truth == "yes" for answer, truth in pairs)
    values = {
        "pope_precision": hit / said if said else 0.0,
        "pope_recall": hit / true if true else 0.0,
        "pope_f1_score": 2 * hit / (said + true) if said + true else 0.0,
        "pope_yes_ratio": said / len(pairs),
    }
    return {metric: Score(value, len(pairs)) for metric, value in values.items()}


def _version(metadata: Any) -> str:
    entries = metadata if isinstance(metadata, list) else [metadata]
    versions = [str(entry["version"]) for entry in entries if isinstance(entry, Mapping) and "version" in entry]
    return ", ".join(versions) or f"of lmms-eval {version('lmms-eval')}"


def _hash(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]
