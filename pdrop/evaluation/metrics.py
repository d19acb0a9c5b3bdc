"""A task's score as a function of its samples, in a form that can be recomputed on any resample of them.

Every score here is a sum over strata of a quotient of sums,

    score = sum over strata of  sum(numerators) / sum(denominators)

with one numerator, denominator and stratum per sample: a mean (denominators 1), POPE's F1 (2 * hit over answered yes
plus truly yes), MME's points (a stratum per category, a pair's accuracies on its two questions), MMBench's circular
accuracy (on a question's first row, whether all its rotations are right), NaturalBench's groups, a mean of categories.
The result is compared with the task's own aggregation; if it does not give the task's own score there are no parts, and
so no interval. No torch, no lmms-eval.
"""

from __future__ import annotations

import logging
import math
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pdrop.evaluation.documents import CIRCLE

log = logging.getLogger(__name__)

# numerator, denominator, stratum
Part = tuple[float, float, str]
Entries = Sequence[Any]  # the aggregation's input for each sample; None if it does not count the sample
Aggregate = Callable[[list[Any]], Any]

NEAR = 2e-5  # share of a full score: some aggregations round to five digits
FRACTIONS = {
    *("exact_match", "acc", "acc_norm", "anls", "f1", "accuracy", "average", "mmmu_acc"),
    *("relaxed_overall", "relaxed_human_split", "relaxed_augmented_split"),
}
YES_NO = ("f1", "f1_score", "precision", "recall", "yes_ratio")
# NaturalBench: for each row of a group, the offsets of the other rows that must be right with it
FOURS: dict[str, dict[int, tuple[int, ...]]] = {
    "G_ACC": {0: (0, 1, 2, 3)},
    "Q_ACC": {0: (0, 1), 2: (0, 1)},
    "I_ACC": {0: (0, 2), 1: (0, 2)},
}
STRATA = ("category", "l2_category", "task_type", "task_category", "task", "sub_task", "subdomain", "type")


@dataclass
class Metric:
    """A score and its parts.

    Attributes:
        value: The score.
        numbers: For each sample its own number, usually right (1) or wrong (0); None if it has none.
        parts: For each sample its part of the score, None if it is not counted. None for a plain mean of `numbers`, and
            if no parts give the score.
        full: What faultless answers would score; None if that is not known.
        n: Samples that count; 0: all.
    """

    value: float
    numbers: list[float | None]
    parts: list[Part | None] | None = None
    full: float | None = None
    n: int = 0

    def __post_init__(self) -> None:
        self.n = self.n or len(self.numbers)


def score_of(parts: Sequence[Part | None]) -> float:
    """The score from its parts; a stratum without a denominator counts 0."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for part in parts:
        if part is not None:
            sums[part[2]][0] += part[0]
            sums[part[2]][1] += part[1]
    return sum(above / below for above, below in sums.values() if below)


def number(value: Any) -> float | None:
    """A metric's number for one sample: the value itself, its score, or whether prediction and answer agree."""
    if isinstance(value, Mapping):
        for said, true in (("pred", "answer"), ("pred_answer", "answer"), ("pred", "ground_truth")):
            if "score" not in value and {said, true} <= set(value) and not isinstance(value[said], (list, dict)):
                return float(str(value[said]).strip().lower() == str(value[true]).strip().lower())
        value = value.get("score", value.get("is_correct"))
    if isinstance(value, (bool, int, float)) and math.isfinite(value):
        return float(value)
    return None


def decomposed(name: str, value: float, entries: Entries, aggregate: Aggregate) -> Metric:
    """A task's own score with its parts, as far as these can be found.

    Args:
        name: The metric's name.
        value: Its score from the task's aggregation.
        entries: The aggregation's input for each sample; None if it did not get the sample.
        aggregate: The task's aggregation.
    """
    there = [entry for entry in entries if entry is not None]
    numbers = [None if entry is None else number(entry) for entry in entries]
    if all(isinstance(entry, Mapping) for entry in there):
        for parts, whole in (counted(name, entries), pairs(entries), together(name, entries), fours(name, entries)):
            if parts is not None and near(score_of(parts), value):
                return Metric(value, numbers, parts, whole, len(there))
    if sum(one is not None for one in numbers) < len(there):
        numbers = alone(entries, aggregate)
    known = [one for one in numbers if one is not None]
    if len(known) < len(there) or not known:
        return Metric(value, numbers, n=len(there))
    fraction = max(known) <= 1 and min(known) >= 0
    mean = sum(known) / len(known)
    if near(mean, value) and (value or name in FRACTIONS or name.startswith(("seed_", "pope_", "ocrbench_"))):
        exact = abs(mean - value) < 1e-9 and len(known) == len(entries)
        plain: list[Part | None] = [None if one is None else (one, 1.0, "") for one in numbers]
        return Metric(value, numbers, None if exact else plain, 1.0 if fraction else None, len(there))
    found, full = stratified(value, entries, numbers, aggregate)
    return Metric(value, numbers, found, full if fraction else None, len(there))


def near(found: float, value: float) -> bool:
    """Whether two scores are equal up to the rounding of aggregations."""
    return abs(found - value) <= NEAR * max(1, abs(value))


def counted(name: str, entries: Entries) -> tuple[list[Part | None] | None, float]:
    """Parts of yes-or-no F1, precision, recall or ratio of yes (arXiv 2305.10355), and the full score."""
    kind = next((kind for kind in YES_NO if name == kind or name.endswith(f"_{kind}")), None)
    if kind is None or not all(e is None or {"prediction", "ground_truth"} <= set(e) for e in entries):
        return None, 1.0
    return [None if e is None else yes_no_part(kind, e["prediction"], e["ground_truth"]) for e in entries], 1.0


def yes_no_part(kind: str, said: str, truth: str, stratum: str = "", share: float = 1.0) -> Part:
    """One answer's part of a score over yes and no.

    Args:
        kind: One of YES_NO.
        said, truth: "yes" or anything else.
        stratum: The sample's stratum.
        share: The stratum's weight.
    """
    yes, true = said == "yes", truth == "yes"
    hit = float(yes and true)
    above, below = {
        "precision": (hit, float(yes)),
        "recall": (hit, float(true)),
        "yes_ratio": (float(yes), 1.0),
    }.get(kind, (2 * hit, float(yes) + float(true)))
    return share * above, below, stratum


def pairs(entries: Entries) -> tuple[list[Part | None] | None, float]:
    """Parts of MME's points (arXiv 2306.13394): per category 100 accuracy + 100 pair accuracy; and the full score."""
    if not all(e is None or {"question_id", "category", "score"} <= set(e) for e in entries):
        return None, 0.0
    scores: dict[tuple[str, Any], list[float]] = defaultdict(list)
    for entry in entries:
        if entry is not None:
            scores[entry["category"], entry["question_id"]].append(float(entry["score"]))
    if any(len(pair) != 2 for pair in scores.values()):
        return None, 0.0
    found: list[Part | None] = []
    for entry in entries:
        if entry is None:
            found.append(None)
            continue
        both = sum(scores[entry["category"], entry["question_id"]]) == 2
        found.append((50.0 * float(entry["score"]) + 50.0 * both, 0.5, str(entry["category"])))
    return found, 200.0 * len({category for category, _ in scores})


def together(name: str, entries: Entries) -> tuple[list[Part | None] | None, float]:
    """Parts of the share of pairs with all answers right (MMVP, arXiv 2401.06209), and the full score."""
    if "pair" not in name or not all(e is None or {"pair_index", "is_correct"} <= set(e) for e in entries):
        return None, 1.0
    hit: dict[Any, bool] = defaultdict(lambda: True)
    for entry in entries:
        if entry is not None:
            hit[entry["pair_index"]] &= bool(entry["is_correct"])
    waiting, found = set(hit), list[Part | None]()
    for entry in entries:  # a pair counts at its first question
        first = entry is not None and entry["pair_index"] in waiting
        found.append(None if entry is None else (float(first and hit[entry["pair_index"]]), float(first), ""))
        waiting -= {entry["pair_index"]} if entry is not None else set()
    return found, 1.0


def fours(name: str, entries: Entries) -> tuple[list[Part | None] | None, float]:
    """Parts of NaturalBench's shares of groups, questions and pictures with all answers right, and the full score.

    Rows 0 to 3 of a group: question 0 on picture 0 and picture 1, then question 1 on both (arXiv 2410.14669).
    """
    kind = next((kind for kind in FOURS if name == f"naturalbench_{kind}"), None)
    if kind is None or not all(e is None or {"id", "score"} <= set(e) for e in entries):
        return None, 1.0
    right = {int(entry["id"]): float(entry["score"]) for entry in entries if entry is not None}
    found: list[Part | None] = []
    for entry in entries:
        place = -1 if entry is None else int(entry["id"])
        others = FOURS[kind].get(place % 4, ())  # rows counted with this one; none: they are counted with another row
        hit = bool(others) and all(right.get(place + step) == 1 for step in others)
        found.append(None if entry is None else (float(hit), float(bool(others)), ""))
    return found, 1.0


def circles(rows: Sequence[Mapping[str, Any]], right: Sequence[bool], full: float = 1.0) -> list[Part | None]:
    """Parts of MMBench's score, the share of questions with all rotations right (arXiv 2307.06281).

    Args:
        rows: With the `index` of each.
        right: Whether each row's answer is right.
        full: The full score, 1 or 100.
    """
    hit: dict[int, bool] = defaultdict(lambda: True)
    for row, one in zip(rows, right):
        hit[int(row["index"]) % CIRCLE] &= one
    first = [int(row["index"]) < CIRCLE for row in rows]  # a rotation does not count as a question
    return [(full * (one and hit[int(row["index"]) % CIRCLE]), float(one), "") for row, one in zip(rows, first)]


def alone(entries: Entries, aggregate: Aggregate) -> list[float | None]:
    """Each sample's own score, by the task's aggregation of it alone, for metrics whose entries show no number.

    A percentage is returned as a fraction. Aggregations that only take whole sets give no scores.
    """
    numbers = [None if entry is None else probed(aggregate, [entry]) for entry in entries]
    known = {one for one in numbers if one is not None}
    return [None if one is None else one / 100 for one in numbers] if known in ({100.0}, {0.0, 100.0}) else numbers


def probed(aggregate: Aggregate, entries: list[Any]) -> float | None:
    """The task's aggregation of some samples; None if it cannot aggregate these alone."""
    try:
        return number(aggregate(entries))
    except Exception as error:  # the whole set's score exists already; without parts no interval is computed
        log.debug("an aggregation of %d samples: %r", len(entries), error)
        return None


def stratified(
    value: float, entries: Entries, numbers: Sequence[float | None], aggregate: Aggregate
) -> tuple[list[Part | None] | None, float | None]:
    """Parts of a multiple of the mean, or of the sum of strata's means, and the full score; None if neither fits.

    The multiple (100, a hundredth of the strata) is derived from the score, and the form is checked on the aggregation
    of other subsets of the samples, so that it does not fit by chance. If nothing is right any multiple fits, and the
    full score is unknown.
    """
    there = [place for place, one in enumerate(numbers) if one is not None and not unanswered(entries[place])]
    keys: list[str | None] = [None]
    if all(isinstance(entries[place], Mapping) for place in there):
        keys += [key for key in STRATA if all(key in entries[place] for place in there)]
    for key in keys:
        strata = ["" if key is None else str(entries[place][key]) for place in there]
        total = score_of([(numbers[place] or 0.0, 1.0, stratum) for place, stratum in zip(there, strata)])
        full = value / total * len(set(strata)) if total else None
        if full is not None and abs(full - round(full)) < NEAR * full:
            full = float(round(full))
        multiple = 1.0 if full is None else full / len(set(strata))
        parts: list[Part | None] = [None] * len(numbers)
        for place, stratum in zip(there, strata):
            parts[place] = (multiple * (numbers[place] or 0.0), 1.0, stratum)
        if all(fits(entries, parts, those, aggregate) for those in subsets(there, strata)):
            return parts, full
    return None, None


def unanswered(entry: Any) -> bool:
    """Whether the task leaves the sample out of its percentage (as MVBench does for an empty answer)."""
    return isinstance(entry, Mapping) and entry.get("pred_answer") == "" and "gt_answer" in entry


def subsets(places: Sequence[int], strata: Sequence[str]) -> list[list[int]]:
    """All places, and two random halves of them that contain a sample of each stratum."""
    found = [list(places)]
    for seed in range(2):
        drawn = random.Random(seed)
        first = dict(zip(reversed(strata), reversed(places))).values()
        found.append(sorted({*first, *drawn.sample(list(places), (len(places) + 1) // 2)}))
    return found


def fits(entries: Entries, parts: Sequence[Part | None], places: Sequence[int], aggregate: Aggregate) -> bool:
    """Whether the parts of some samples give the task's aggregation of these samples."""
    wanted = probed(aggregate, [entries[place] for place in places])
    return wanted is not None and near(score_of([parts[place] for place in places]), wanted)
