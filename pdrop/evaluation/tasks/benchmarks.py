"""Functions of this folder's task files: TextVQA with OCR tokens, MMBench-CN without a judge, NaturalBench with any
number of groups, boxes of RefCOCO.

Scoring is lmms-eval's own code, imported where it is called: by then pdrop.evaluation.lmms has imported lmms-eval and
undone the side effects. Boxes cannot be scored from the text alone: see pdrop/evaluation/grounding.py, which scores
them for run.py; for lmms-eval's own command line, `box_results` does.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence
from typing import Any

SHORT = "Answer the question using a single word or phrase."
NATURALBENCH = ("naturalbench_G_ACC", "naturalbench_Q_ACC", "naturalbench_I_ACC")
LETTER = "请直接使用所提供的选项字母作为答案回答。"


def picture(row: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> list[Any]:
    """The row's picture, as a list of one PIL image."""
    return [row["image"].convert("RGB")]


def textvqa_question(row: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """Question, OCR tokens, instruction: the three lines of LLaVA's eval_textvqa.py."""
    return f"{row['question']}\nReference OCR token: {', '.join(row['ocr_tokens'])}\n{SHORT}"


def textvqa_results(row: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """VQA accuracy (mean over ten leave-one-out of min(1, matches / 3)), by the code of lmms-eval's task."""
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results

    return {"exact_match": textvqa_process_results(row, results)["exact_match"]}


def mmbench_question(row: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """Hint, question and options, a line each, and the instruction in Chinese (LLaVA's --lang cn)."""
    hint = [] if str(row["hint"]) in ("nan", "None", "") else [str(row["hint"])]
    options = [f"{letter}. {row[letter]}" for letter in "ABCD" if str(row.get(letter, "nan")) not in ("nan", "None")]
    return "\n".join([*hint, str(row["question"]), *options, LETTER])


def mmbench_results(row: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """The input of MMBench's aggregation for a row, by the code of lmms-eval's task."""
    from lmms_eval.tasks.mmbench.en_utils import mmbench_process_results

    return {"gpt_eval_score": mmbench_process_results(row, results)["gpt_eval_score"]}


def mmbench_circular(rows: Sequence[dict[str, Any]]) -> float:
    """Percentage of questions with all rotations right, by lmms-eval's rules without a judge."""
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

    return 100 * float(mmbench_evaluator.eval_result(list(rows), eval_method="static")[0])


def naturalbench_picture(row: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> list[Any]:
    """The row's picture, as a list of one PIL image."""
    return [row["Image"].convert("RGB")]


def naturalbench_question(row: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """Question and instruction, by the code of lmms-eval's task."""
    from lmms_eval.tasks.naturalbench.utils import naturalbench_doc_to_text

    return str(naturalbench_doc_to_text(row))


def naturalbench_results(row: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Whether the answer is right, read by the code of lmms-eval's task: question 0 is true of picture 0 alone,
    question 1 of picture 1."""
    from lmms_eval.tasks.naturalbench.utils import extract_answer

    with contextlib.redirect_stdout(io.StringIO()):  # it prints which answers it cannot read
        read = extract_answer(results[0], task_type=row["Question_Type"])
    right = float(read == int(int(row["Index"]) % 4 in (0, 3)))
    grouped = {name: {"id": int(row["Index"]), "score": right} for name in NATURALBENCH}
    return grouped | {"naturalbench_ACC": right, "unreadable": float(read < 0)}


def naturalbench_groups(rows: Sequence[dict[str, Any]]) -> float:
    """The share of groups with all four answers right."""
    return _share_of_fours(rows, [(0, 1, 2, 3)])


def naturalbench_questions(rows: Sequence[dict[str, Any]]) -> float:
    """The share of questions that are answered right on both pictures."""
    return _share_of_fours(rows, [(0, 1), (2, 3)])


def naturalbench_pictures(rows: Sequence[dict[str, Any]]) -> float:
    """The share of pictures on which both questions are answered right."""
    return _share_of_fours(rows, [(0, 2), (1, 3)])


def _share_of_fours(rows: Sequence[dict[str, Any]], together: Sequence[tuple[int, ...]]) -> float:
    right = {row["id"]: bool(row["score"]) for row in rows}
    groups = sorted({place // 4 for place in right})
    hits = [all(right[4 * group + step] for step in steps) for group in groups for steps in together]
    return sum(hits) / len(hits)


def expressions(dataset: Any) -> Any:
    """RefCOCO's objects, a row for each of their sentences; pictures are copied as files, never decoded.

    `image_id` is the picture, which several objects may share; `width` and `height` are the picture's, in pixels.
    """
    import datasets
    from PIL import Image

    stored = dataset.cast_column("image", datasets.Image(decode=False))
    places = [place for place, answers in enumerate(stored["answer"]) for _ in answers]
    sentences = [sentence for answers in stored["answer"] for sentence in answers]
    sizes = [Image.open(io.BytesIO(image["bytes"])).size for image in stored["image"]]
    names = [re.sub(r"_\d+(?=\.\w+$)", "", name) for name in stored["file_name"]]
    columns = {
        "sentence": sentences,
        "image_id": [names[place] for place in places],
        "width": [sizes[place][0] for place in places],
        "height": [sizes[place][1] for place in places],
    }
    rows = stored.select(places).remove_columns([c for c in ("question_id", "answer") if c in stored.column_names])
    for name, column in columns.items():
        rows = rows.add_column(name, column)
    return rows.cast_column("image", datasets.Image())


def expression(row: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """The sentence alone: pdrop/evaluation/grounding.py puts it into the prompt of the model's family."""
    return str(row["sentence"])


def box_results(row: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """ACC@0.5, IoU and `unreadable` of an answer that says how the model saw the picture, as `--model pdrop` gives it.

    Without that, `unreadable` alone: 1 if four numbers cannot be read. Which picture they refer to is not known.
    """
    from pdrop.evaluation import grounding

    words, sight = grounding.parted(results[0])
    if sight is None:
        return {"unreadable": float(len(re.findall(grounding.NUMBER, words)) < 4)}
    return dict(grounding.box_numbers(words, sight, row))
