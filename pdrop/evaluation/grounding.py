"""Boxes for a referring expression: each model family's prompt, coordinate frame, and how its answer is read.

Models are trained on boxes in what they see, not in the picture, each in its own way; with another family's prompt or
frame they score nothing (Qwen2.5-VL in lmms-eval's frame: 0 %). So a task gives the expression, and the family the
rest:

    llava          0 to 1 of the square that the tower sees: the padded picture, or its middle (haotian-liu/LLaVA#606,
                   #822); the prompt of its training data
    qwen2_5_vl     pixels of the picture as the processor resized it; JSON with bbox_2d (QwenLM/Qwen3-VL#991)
    qwen3_vl       thousandths of the picture; the same prompt
    internvl       thousandths, or 0 to 1 if the four add up to less than 4 (InternVL's evaluate_grounding.py)

Every box is converted to pixels of the original picture, clipped to it, and compared with the true box: ACC@0.5 (the
intersection is at least half of the union), mean IoU, and the share of answers in which no box can be read. Families
without a published prompt, frame and reading are refused. No torch, no lmms-eval.

lmms-eval's own command line scores text alone: there each answer is followed by its `Sight`, which the task reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pdrop.evaluation.answers import Answer, Question, Seen
from pdrop.evaluation.metrics import Metric
from pdrop.evaluation.official import said

Box = tuple[float, float, float, float]  # left, top, right, bottom
TASKS = re.compile(r"refcoco(plus|g)?_rec_\w+")
PATCH = 14  # pixels of Qwen2.5-VL's patches
NUMBER = r"-?(?:\d+\.?\d*|\.\d+)"
BRACKETED = re.compile(
    rf"[\[(]+\s*({NUMBER})\s*,\s*({NUMBER})\s*[)\]]?\s*,\s*[\[(]?\s*({NUMBER})\s*,\s*({NUMBER})\s*[\])]"
)


@dataclass(frozen=True)
class Family:
    """The prompt for a box of a family of models, and the frame of its answers."""

    prompt: str
    frame: Literal["seen", "resized", "thousandths", "thousandths or shares"]


REGION = "Please provide the bounding box coordinate of the region this sentence describes: "
LOCATE = "Locate {} in this image and output the bbox coordinates in JSON format."
# by transformers' model_type
FAMILIES = {
    "llava": Family(REGION + "{}", "seen"),
    "qwen2_5_vl": Family(LOCATE, "resized"),
    "qwen3_vl": Family(LOCATE, "thousandths"),
    "qwen3_vl_moe": Family(LOCATE, "thousandths"),
    "internvl": Family(REGION + "<ref>{}</ref>", "thousandths or shares"),
}


SIGHT = "\n<sight>"  # what follows it in an answer's text is a Sight


@dataclass(frozen=True)
class Sight:
    """How a model saw the picture of an answer, which its boxes refer to.

    Attributes:
        family: The family whose prompt was used.
        layout, images: The answer's (pdrop/evaluation/answers.py).
    """

    family: str
    layout: list[list[list[float]]] | None
    images: Seen

    @classmethod
    def of(cls, answer: Answer, family: str) -> Sight:
        """The sight of an answer."""
        return cls(family, answer.layout, answer.images)


def with_sight(answer: Answer, family: str) -> Answer:
    """The answer with its sight at the end of its text, for a task that is given the text alone."""
    return replace(answer, text=f"{answer.text}{SIGHT}{json.dumps(asdict(Sight.of(answer, family)))}")


def parted(text: str) -> tuple[str, Sight | None]:
    """What the model said, and its sight; None if the text ends without one."""
    words, mark, sight = text.rpartition(SIGHT)
    return (words, Sight(**json.loads(sight))) if mark else (text, None)


def asks_boxes(task: str) -> bool:
    """Whether a task's answers are boxes in the family's frame."""
    return TASKS.fullmatch(task) is not None


def family_of(tasks: Sequence[str], model_type: str) -> str | None:
    """The family whose prompt and frame these tasks use; None if none of them asks for boxes.

    Raises:
        ValueError: If the model's family has no known prompt, frame and reading of a box.
    """
    asking = [task for task in tasks if asks_boxes(task)]
    if not asking:
        return None
    if model_type not in FAMILIES:
        raise ValueError(
            f"task {asking[0]}: how a {model_type} model is asked for a box, and in which frame it answers, is not "
            f"known; it is of {', '.join(FAMILIES)}: leave the task out"
        )
    return model_type


def asked(question: Question, family: str | None) -> Question:
    """The question in the family's prompt; questions that do not ask for boxes are unchanged."""
    if family is None or not asks_boxes(question.task):
        return question
    return replace(question, text=FAMILIES[family].prompt.format(question.text))


def read_box(answer: str) -> Box | None:
    """The first four numbers in brackets, else the first four numbers; None if there are fewer."""
    if (found := BRACKETED.search(answer)) is not None:
        numbers = list(map(float, found.groups()))
    else:
        numbers = [float(text) for text in re.findall(NUMBER, answer.replace("bbox_2d", ""))][:4]
    return None if len(numbers) < 4 else (numbers[0], numbers[1], numbers[2], numbers[3])


def in_pixels(box: Box, sight: Sight, width: int, height: int) -> Box:
    """An answered box in pixels of the original picture, corners in order, clipped to the picture.

    Args:
        box: The box as read.
        sight: Whose frame it is in, and how the model saw the picture.
        width, height: Size of the original picture.

    Raises:
        ValueError: If the sight does not tell what the family's frame needs.
    """
    left, top, across, down = 0.0, 0.0, float(width), float(height)
    frame = FAMILIES[sight.family].frame
    if frame == "seen":
        if not sight.layout:
            raise ValueError("what the tower saw of the picture is not known: its boxes cannot be read")
        _, _, _, *seen = sight.layout[0][0]
        left, top = seen[0] * width, seen[1] * height
        across, down = (seen[2] - seen[0]) * width, (seen[3] - seen[1]) * height
    elif frame == "resized":
        if not isinstance(sight.images, list) or not sight.images:
            raise ValueError("how the processor resized the picture is not known: its boxes cannot be read")
        _, rows, columns = sight.images[0]
        across, down = width / (columns * PATCH), height / (rows * PATCH)
    elif frame == "thousandths" or sum(box) >= 4:
        across, down = width / 1000, height / 1000
    x = sorted(min(max(left + value * across, 0.0), float(width)) for value in box[::2])
    y = sorted(min(max(top + value * down, 0.0), float(height)) for value in box[1::2])
    return x[0], y[0], x[1], y[1]


def iou(first: Box, second: Box) -> float:
    """Intersection over union; 0 if both are empty."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    both = max(width, 0.0) * max(height, 0.0)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)) - both
    return both / union if union > 0 else 0.0


def box_numbers(words: str, sight: Sight, doc: Mapping[str, Any]) -> dict[str, float]:
    """ACC@0.5, IoU, and whether no box can be read, of one answer.

    Args:
        words: What the model said.
        sight: How it saw the picture.
        doc: The task's document: `bbox` (x, y, width, height in pixels), `width`, `height` of the picture.
    """
    if (box := read_box(words)) is None:
        return {"acc_0.5": 0.0, "mean_iou": 0.0, "unreadable": 1.0}
    x, y, across, down = map(float, doc["bbox"])
    overlap = iou(in_pixels(box, sight, int(doc["width"]), int(doc["height"])), (x, y, x + across, y + down))
    return {"acc_0.5": float(overlap >= 0.5), "mean_iou": overlap, "unreadable": 0.0}


def box_scores(samples: Sequence[Mapping[str, Any]], answers: Sequence[Answer], family: str) -> dict[str, Metric]:
    """ACC@0.5, mean IoU and the share of unreadable answers of a task.

    Args:
        samples: As lmms-eval logs them, with the document.
        answers: Their answers.
        family: The family whose prompt was used.
    """
    scored = [box_numbers(said(one), Sight.of(answer, family), one["doc"]) for one, answer in zip(samples, answers)]
    named = {name: [one[name] for one in scored] for name in scored[0]}
    return {name: Metric(sum(found) / len(found), [*found], full=1.0) for name, found in named.items()}
