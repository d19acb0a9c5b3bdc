"""`--model pdrop --model_args ...` on lmms-eval's own command line: the same words mean the same as to run.py.

    python -m lmms_eval --model pdrop --tasks pope --batch_size 8 --model_args \\
        pretrained=llava-hf/llava-1.5-7b-hf,method=pyramiddrop,stages=4,ratio=0.5,prompt=vicuna_v1,image_mode=pad

    pretrained      a folder, a Hub repository or package://module/folder (the embedded model)
    method          a file of conf/method/: none, pyramiddrop, fastv, random, ... (as in conf/run.yaml)
    stages, ratio, layers, positions, twin, seed    run.py's dials; layers=[8,16,24]
    schedule.budget=192, method.recycle=0, ...  parts of the method's file
    dtype, device, prompt, ...                  run.py's dials of how it is asked, and conf/checkpoint.yaml's by name

Defaults are those of conf/run.yaml; the device is cuda if there is a GPU. Unlike run.py, it stores nothing between
calls. Scores are lmms-eval's, and those of the boxes of refcoco_rec_* are run.py's: they are asked for in the family's
words and scored in pixels of the original picture. For that, their answers end in how the model saw the picture
(pdrop/evaluation/grounding.py), which is also in lmms-eval's log of samples.

Under `accelerate launch --num_processes 8 -m lmms_eval --model pdrop ...` each process answers its share of the
documents on its own device, and lmms-eval gathers the scores. Batches are then made within a share: questions have
other neighbours than in one process, so in 16 bits a few answers may differ; with run.py's `workers=8` none does.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import yaml

from pdrop.cli.compose import PARTS, CheckpointConfig, DroppingDials, RunConfig, compose, settings_of
from pdrop.evaluation import grounding
from pdrop.evaluation.answers import Answer, Question
from pdrop.evaluation.generation import Generator
from pdrop.evaluation.lmms import adapter
from pdrop.record import RunSpec
from pdrop.runs.device import chosen

log = logging.getLogger(__name__)

DROPPING = (*(field.name for field in fields(DroppingDials) if field.name != "schedule"), "seed")
# lmms-eval itself has tasks and limit
OTHERS = {field.name for kind in (CheckpointConfig, RunConfig) for field in fields(kind)}
OTHERS &= {field.name for field in fields(RunSpec)} - {*DROPPING, *PARTS, "model", "latency", "tasks", "limit"}


def from_arguments(pretrained: str = "package://pdrop.embedded/model", **arguments: Any) -> Generator:
    """Make the generator that the arguments describe.

    Args:
        pretrained: The checkpoint.
        arguments: Those listed in the module's docstring, as lmms-eval has parsed them: numbers, or text.

    Raises:
        ValueError: For unknown arguments, methods and values, before anything is loaded; or if loading refuses.
    """
    arguments.pop("max_batch_size", None)  # lmms-eval's own, for its search for a batch size, which is not needed here
    known = (*DROPPING, *sorted(OTHERS))
    if unknown := [name for name in arguments if name not in known and name.split(".")[0] not in PARTS]:
        names = ", ".join(("pretrained", *known, *(f"{part}.*" for part in PARTS)))
        raise ValueError(f"model_args: unknown {', '.join(sorted(unknown))}; there are {names}")
    of_run = {field.name for field in fields(RunConfig)}
    dials = {(n if n in of_run or "." in n else f"model.{n}"): read(value) for n, value in arguments.items()}
    if many_processes() and arguments.get("device") in (None, "cuda") and chosen(None) == "cuda":
        dials["device"] = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    dials |= {"model": "folder", "model.name": "lmms_eval", "model.path": pretrained, "tasks": [], "latency": "off"}
    try:
        settings = settings_of(*compose(dials), asked=True)
    except ValueError as error:
        raise ValueError(f"model_args: {error}") from error
    log.info("%s: %r, %r", pretrained, settings.method, settings.schedule)
    return Generator(settings.load(), settings.method, settings.schedule, settings.spec)


def many_processes() -> bool:
    """Whether a launcher (accelerate launch, torchrun) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def read(value: Any) -> Any:
    """An argument's value: lmms-eval leaves lists and null as text, and makes -1 a float."""
    if isinstance(value, str):
        value = yaml.safe_load(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def __getattr__(name: str) -> Any:
    if name != "PdropModel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return command_adapter()


def uncut(question: Question) -> Question:
    """The question without the "\\n\\n" that lmms-eval adds as an answer's end if a task's file names none; its own
    models ignore it, too."""
    if question.arguments.get("until") != ["\n\n"]:
        return question
    return replace(question, arguments={name: value for name, value in question.arguments.items() if name != "until"})


def in_own_words(questions: Sequence[Question], family: str) -> list[Question]:
    """The questions as run.py asks them: without that end, and for boxes in the words of the model's family.

    Raises:
        ValueError: If a task asks for boxes, and how this family is asked is not known.
    """
    boxes = grounding.family_of([question.task for question in questions], family)
    return [grounding.asked(uncut(question), boxes) for question in questions]


def for_its_task(question: Question, answer: Answer, family: str) -> Answer:
    """The answer as the question's task is given it: of a box, with how the model saw the picture."""
    return grounding.with_sight(answer, family) if grounding.asks_boxes(question.task) else answer


def command_adapter() -> type:
    """The class that lmms-eval makes for `--model pdrop`, by its model_args."""

    from accelerate import Accelerator

    class PdropModel(adapter()):  # type: ignore[misc]
        """Answers questions as the arguments say; one of several processes answers its share."""

        def __init__(self, **arguments: Any) -> None:
            generator = from_arguments(**arguments)
            family = generator.model.config.model_type

            def ask(questions: list[Question]) -> list[Answer]:
                answers = generator.answer(in_own_words(questions, family)).answers
                return [for_its_task(question, answer, family) for question, answer in zip(questions, answers)]

            super().__init__(ask)
            self.device = generator.model.device
            if many_processes():  # lmms-eval counts and gathers by these
                self.accelerator = Accelerator()
                self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

    return PdropModel
