"""What scores are made of: parts give the task's own score, on all samples and on any draw of whole pictures."""

import datasets
import numpy as np
import pytest

from analysis.statistics import counts, quotients
from analysis.store.load import clusters_of, columns
from analysis.store.samples import parse
from pdrop.evaluation.documents import CIRCLE, Documents, runs_of
from pdrop.evaluation.lmms import import_lmms_eval
from pdrop.evaluation.metrics import decomposed, number, score_of
from pdrop.evaluation.official import gqa, option, pope, science_qa, yes_or_no
from pdrop.evaluation.readings import readings
from pdrop.evaluation.tasks.benchmarks import mmbench_circular
from pdrop.samples import read_samples
from tests.support.answering import scored
from tests.support.synthetic_sets import write_set
from tests.support.synthetic_tasks import LETTERS, TASKS, write_task, write_tasks


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """All synthetic tasks, scored on messy answers."""
    folder = tmp_path_factory.mktemp("metrics")
    return scored(folder / "run", list(TASKS), write_tasks(folder, count=24)), folder / "run"


def test_parts_or_the_mean_give_every_score(everything):
    evaluation, folder = everything
    assert set(evaluation.results) == set(TASKS)
    for task, result in evaluation.results.items():
        samples = read_samples(folder, task)
        for metric, score in result.scores.items():
            if any(metric in sample.get("parts", {}) for sample in samples):
                found = score_of([sample.get("parts", {}).get(metric) for sample in samples])
            else:
                found = np.mean([sample["scores"][metric] for sample in samples if metric in sample["scores"]])
            assert found == pytest.approx(score.value, abs=2e-5 * max(1, score.value)), (task, metric)
            assert score.full in (1, 100) or metric.startswith("mme_"), (task, metric)
        main = [sample["scores"].get(result.main_metric) for sample in samples]
        assert sum(one is not None for one in main) == result.scores[result.main_metric].n, "for flips and McNemar"
        assert sum(sample.get("read", "") is None for sample in samples) == result.invalid


def test_mme_has_its_total_and_mmbench_both_passes(everything):
    mme = everything[0].results["mme"].scores
    points = [mme[f"mme_{name}_score"] for name in ("perception", "cognition", "total")]
    assert points[2].value == pytest.approx(points[0].value + points[1].value) and points[2].value > 0
    assert [score.full for score in points] == [400, 200, 600] and points[2].n == 24
    found = everything[0].results["mmbench_en_dev_static"].scores
    assert {"gpt_eval_score", "circular_accuracy", "single_pass_accuracy"} <= set(found)
    assert found["gpt_eval_score"].full == 100 and found["circular_accuracy"].full == 1


def circular(tmp_path, questions=10, moves=True):
    """MMBench with rotations after all first rows, as the English data set has them. If the right option does not move
    with them it is A in all."""

    def row(place):
        rotation, question = divmod(place, questions)
        letters = LETTERS[rotation:] + LETTERS[:rotation]
        made = TASKS["mmbench_en_dev_static"][2](question)
        return made | {"index": question + rotation * CIRCLE, "answer": letters[question % 4] if moves else "A"}

    return write_task(tmp_path, "mmbench_en_dev_static", [row(place) for place in range(4 * questions)])


def test_a_limit_takes_whole_circles_and_the_single_pass_is_another_number(tmp_path):
    tasks = circular(tmp_path)
    task = "mmbench_en_dev_static"
    few = scored(tmp_path / "few", [task], tasks, ["A", "B", "C", "D", "A"], limit=5).results[task]
    samples = read_samples(tmp_path / "few", task)
    assert few.n == 8 and [sample["doc_id"] for sample in samples] == [0, 1, 10, 11, 20, 21, 30, 31]
    assert {sample["group"] for sample in samples} == {"0", "1"}
    right = scored(tmp_path / "right", [task], tasks, ["A"]).results[task].scores  # right where A is, in one of four
    assert right["gpt_eval_score"].value == 0 == right["circular_accuracy"].value
    assert right["single_pass_accuracy"].value == pytest.approx(0.3), "questions 0, 4 and 8"
    assert right["gpt_eval_score"].full == 100, "0.0 is a percentage, not a fraction"


def drawn(folder, task, metric, again, draws=40):
    """A metric in the bootstrap's draws, and `again` of the drawn entries: each as often as its picture or group is
    drawn, with the number of its copy. Draws that lack a whole stratum are left out."""
    samples = [parse(sample, metric) for sample in read_samples(folder, task)]
    entries = [sample["metrics"][metric] for sample in read_samples(folder, task) if metric in sample["metrics"]]
    found = columns(samples, task, metric)
    parts = found.parts
    scores = quotients(task, parts.above[:, None], parts.below[:, None], parts.strata, found.clusters)[:, 0]
    often = np.stack([counts(cluster) for cluster in found.clusters])  # [samples, draws]
    pairs = []
    for draw in range(draws):
        copies = [(entry, n) for entry, times in zip(entries, often[:, draw], strict=True) for n in range(times)]
        if {parts.strata[place] for place in np.flatnonzero(often[:, draw])} == set(parts.strata):
            pairs.append((scores[draw], again(copies)))
    assert len(pairs) > draws / 2 and len({one for one, _ in pairs}) > 5
    return np.array(pairs).T


def test_the_bootstrap_is_of_the_tasks_own_aggregation(tmp_path):
    """lmms-eval's code on the drawn questions themselves: POPE's F1, MME's pairs, MMBench's circles."""
    import_lmms_eval()
    from lmms_eval.tasks.mme.utils import mme_aggregate_results
    from lmms_eval.tasks.pope.utils import pope_aggregate_f1_score

    tasks = write_tasks(tmp_path, ["pope", "mme"], count=60)
    scored(tmp_path / "run", ["pope", "mme"], tasks, ["yes", "no", "yes"])  # it miscounts others' recall
    scores, again = drawn(
        tmp_path / "run", "pope", "pope_f1_score", lambda those: pope_aggregate_f1_score([e for e, _ in those])
    )
    assert scores == pytest.approx(again)

    def points(copies):
        return mme_aggregate_results([e | {"question_id": (e["question_id"], n)} for e, n in copies])

    for metric in ("mme_perception_score", "mme_cognition_score"):
        scores, again = drawn(tmp_path / "run", "mme", metric, points)
        assert scores == pytest.approx(again)

    def circles_of(copies):
        return mmbench_circular([e | {"index": int(e["index"]) + 1000 * n} for e, n in copies])

    task = "mmbench_en_dev_static"
    scored(tmp_path / "mmb", [task], circular(tmp_path, moves=False), ["A"] * 11 + ["B"])
    scores, again = drawn(tmp_path / "mmb", task, "gpt_eval_score", circles_of)
    assert scores == pytest.approx(again)


def test_naturalbenchs_groups_are_whole_and_score_as_lmms_evals_code_has_it(tmp_path):
    tasks = write_set(tmp_path, ["naturalbench"], count=24)
    few = scored(tmp_path / "few", ["naturalbench"], tasks, limit=5).results["naturalbench"]
    assert (few.n, few.n_total, few.main_metric) == (8, 24, "naturalbench_G_ACC")
    answers = ["Yes", "no", "No.", "A", "(B)", "yes or A"]
    found = scored(tmp_path / "run", ["naturalbench"], tasks, answers).results["naturalbench"]
    samples = read_samples(tmp_path / "run", "naturalbench")
    assert [sample["group"] for sample in samples[:5]] == ["0"] * 4 + ["1"]
    from lmms_eval.tasks.naturalbench.utils import extract_answer, get_scores

    kinds = [("multiple_choice", "yes_no")[n // 4 % 2] for n in range(24)]
    read = [extract_answer(one["answer"], kind) for one, kind in zip(samples, kinds)]
    theirs = get_scores([[float(one) for one in read[n : n + 4]] for n in range(0, 24, 4)])
    assert found.invalid == read.count(-1) > 0
    for metric, name in (("G_ACC", "G_Acc"), ("Q_ACC", "Q_Acc"), ("I_ACC", "I_Acc"), ("ACC", "Acc")):
        score = found.scores[f"naturalbench_{metric}"]
        assert score.value == pytest.approx(theirs[name]) and score.full == 1
        parts = [sample.get("parts", {}).get(f"naturalbench_{metric}") for sample in samples]
        assert metric == "ACC" or score_of(parts) == pytest.approx(theirs[name]), "an interval on groups"
    drawn = clusters_of([parse(sample, "naturalbench_G_ACC") for sample in samples], "naturalbench")
    assert [len(set(drawn[n : n + 4])) for n in range(0, 24, 4)] == [1] * 6 and len(set(drawn)) == 6


def test_a_right_group_of_naturalbench_counts_in_all_of_its_scores():
    rows = [{"id": n, "score": float(n != 6)} for n in range(8)]
    means = {"G_ACC": 1 / 2, "Q_ACC": 3 / 4, "I_ACC": 3 / 4}
    for name, mean in means.items():
        found = decomposed(f"naturalbench_{name}", mean, rows, lambda some: 1 / 0)
        assert score_of(found.parts) == pytest.approx(mean) and found.numbers[6] == 0


def test_a_limit_keeps_pairs_together(tmp_path):
    tasks = write_tasks(tmp_path, ["mme", "pope"], count=8)
    found = scored(tmp_path / "run", ["mme", "pope"], tasks, limit=5).results
    assert (found["mme"].n, found["pope"].n) == (6, 5)
    assert runs_of([1, 1, 2, 3, 3, 1]) == ["1 0", "1 0", None, "3 3", "3 3", None]
    assert runs_of([1, 2, 3]) is None and runs_of([7] * 9) is None, "a column that repeats as often marks no group"


def test_sets_and_pairs_of_other_benchmarks_are_known_by_their_columns():
    def groups(**columns):
        return Documents(datasets.Dataset.from_dict(columns))

    hallusion = groups(category=["VD"] * 6, subcategory=["a"] * 6, set_id=list("001122"), figure_id=list("010101"))
    assert hallusion.groups == ["VD a 0"] * 2 + ["VD a 1"] * 2 + ["VD a 2"] * 2 and hallusion.first(3) == [0, 1, 2, 3]
    mmvp = groups(**{"Index": [1, 2, 3, 4], "Correct Answer": ["(a)"] * 4})
    assert mmvp.first(1) == [0, 1] and mmvp.first(4) is None and mmvp.group(3) == "1"
    assert groups(index=[5, 6, 7]).first(2) == [0, 1], "an index without rotations makes no circles"
    entries = [{"pair_index": n // 2, "is_correct": n != 3, "pred": "A"} for n in range(6)]
    found = decomposed("mmvp_pair_accuracy", 2 / 3, entries, lambda some: 1 / 0)
    assert score_of(found.parts) == pytest.approx(2 / 3) and (found.full, found.numbers[3]) == (1, 0)


def test_official_rules_read_messy_answers():
    assert [yes_or_no(a) for a in ("Yes.", "No", "there is not, no", "I see it", "", "No,", "yes. No")] == [
        *("yes", "no", "no", "yes", "yes", "no", "yes"),
    ]  # fmt: skip
    assert science_qa("B", "B") and science_qa("B. a cat", "B") and science_qa("The answer is B.", "B")
    assert not science_qa("b", "B") and not science_qa("(B)", "B") and not science_qa("", "B")
    assert gqa("Red.", "red") and not gqa("the red", "red") and not gqa("r-ed", "red")
    texts = {"A": "a cat", "B": "a dog"}
    assert [option(a, texts) for a in ("B", "(B).", "It is a dog", "A or B", "", "a cat, a dog")] == [
        *("B", "B", "B", "", "", ""),
    ]  # fmt: skip


def test_under_the_official_protocol_the_official_rule_is_what_tables_show(tmp_path):
    names = ["pope", "gqa", "scienceqa_img", "mmbench_en_dev_static", "mme", "docvqa_val"]
    tasks = write_tasks(tmp_path, names, count=8)
    shown = {}
    for protocol in ("official", "checkpoint"):
        found = scored(tmp_path / protocol, names, tasks, protocol=protocol).results
        shown[protocol] = [found[name].main_metric for name in names]
        assert {"pope_f1_score", "official_f1"} <= set(found["pope"].scores), "both are there, named apart"
    apart = ["official_f1", "official_accuracy", "official_accuracy", "circular_accuracy"]
    assert shown["official"] == [*apart, "mme_perception_score", "anls"]
    assert shown["checkpoint"] == ["pope_f1_score", "exact_match", "exact_match", "gpt_eval_score",
                                   "mme_perception_score", "anls"]  # fmt: skip


def test_popes_official_f1_is_the_mean_over_categories():
    def sample(category, answer, target):
        return {"doc": {"category": category}, "target": target, "filtered_resps": [answer]}

    rows = [("random", "Yes, there is", "yes"), ("random", "no", "yes"), ("popular", "I see one", "no")]
    found = pope([sample(*row) for row in rows])
    assert found["official_f1"].value == pytest.approx((2 / 3 + 0) / 2)
    assert found["official_accuracy"].value == pytest.approx(1 / 3)
    assert found["official_yes_ratio"].value == pytest.approx(2 / 3)


def test_readings_know_a_task_by_its_targets():
    def read(targets, answers, docs=({},)):
        rows = zip(targets, answers, docs * len(targets))
        return readings([{"target": t, "filtered_resps": [a], "doc": d} for t, a, d in rows])

    assert read(["yes", "no", "no"], ["Yes, it is", "cannot say", "It is not."]) == ["yes", None, "no"]
    choices = {"options": ["a cat", "a dog"]}
    assert read(["A", "B", "B"], ["the cat", "(B)", "C"], (choices,)) == [None, "B", None]
    assert read(["red", "yes"], ["blue", " "]) == ["blue", None], "a text is read wherever there is one"
    unreadable = [{"target": "x", "filtered_resps": ["[1, 2"], "doc": {}, "unreadable": 1.0}]
    assert readings(unreadable) == [None]


def mean_of_categories(entries):
    """As MLVU has it: 100 * the mean over three categories, one of which may be absent."""
    by_category = {}
    for entry in entries:
        by_category.setdefault(entry["task_type"], []).append(entry["pred_answer"] == entry["answer"])
    return 100 * sum(sum(one) / len(one) for one in by_category.values()) / 3


def test_forms_are_found_from_the_tasks_own_aggregation():
    drawn = np.random.default_rng(0)
    entries = [
        {"task_type": "abc"[n % 3], "pred_answer": "A", "answer": "AB"[int(drawn.integers(2))]} for n in range(30)
    ]
    found = decomposed("mlvu", mean_of_categories(entries), entries, mean_of_categories)
    assert found.full == 100 and len({part[2] for part in found.parts}) == 3
    assert score_of(found.parts) == pytest.approx(found.value)
    opaque = [{"correct": n % 3 == 0} for n in range(12)]  # no number in it: each sample is asked about alone
    found = decomposed("own", 100 * 4 / 12, opaque, lambda some: 100 * sum(e["correct"] for e in some) / len(some))
    assert found.numbers == [float(n % 3 == 0) for n in range(12)] and found.full == 100
    assert score_of(found.parts) == pytest.approx(100 * 4 / 12)


def test_where_the_form_is_not_found_nothing_is_claimed():
    entries = [{"score": float(n % 2)} for n in range(8)]
    found = decomposed("odd", 0.25, entries, lambda some: (sum(e["score"] for e in some) / len(some)) ** 2)
    assert found.parts is None and found.full is None and found.numbers == [0, 1] * 4

    def whole_only(some):
        assert len(some) == 8
        return 0.7

    assert decomposed("odd", 0.7, [{"x": 1}] * 8, whole_only).parts is None
    nothing = decomposed("points", 0.0, [0.0] * 4, lambda some: 100 * sum(some))
    assert nothing.full is None, "0.0 in every sample may be of points as well as of a fraction"
    assert number({"score": "x"}) is None and number(True) == 1.0
