"""Batches: questions whose prompts have about equally many tokens, visual ones included, are asked together.

Batches follow from the documents alone, by picture sizes and the processor's arithmetic: they are the same with any
number of workers, at the first start and after a kill. So a prompt's batch, which affects the last bits of its numbers,
never depends on the course of a run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from pdrop.evaluation.answers import Question, QuestionError, described
from pdrop.evaluation.generation_arguments import GenerationArguments
from pdrop.evaluation.picture_cache import PictureCache
from pdrop.evaluation.prompts import PromptBuilder
from pdrop.evaluation.rows import glance
from pdrop.record import RunSpec, canonical_json


def planned(
    questions: Sequence[Question], builder: PromptBuilder, spec: RunSpec, cache: PictureCache, pixels: float = 1.0
) -> list[list[Question]]:
    """The batches of a run's questions, in the order in which they are asked.

    Args:
        questions: Questions of one or several tasks.
        builder: Makes their prompts.
        spec: The run's.
        cache: Remembers the sizes of documents' pictures.
        pixels: Share of a picture's pixels that the processor is given.

    Raises:
        QuestionError: If a question's arguments are not supported, before any question is asked.
    """
    found = list(batches(questions, spec.batch_size, prompt_tokens(questions, builder, scope_of(spec), cache, pixels)))
    check_arguments(found, spec)
    return found


def batches(questions: Sequence[Question], size: int, tokens: Sequence[int]) -> Iterator[list[Question]]:
    """Batches of equal generation arguments, longest prompts first, in an order that depends on the questions alone.

    Args:
        questions: All that are to be asked.
        size: Questions in a batch.
        tokens: Tokens of each question's prompt.
    """
    groups: dict[str, list[tuple[int, Question]]] = defaultdict(list)
    for length, question in zip(tokens, questions, strict=True):
        groups[canonical_json([question.continuation is None, dict(question.arguments)])].append((length, question))
    for _, group in sorted(groups.items()):
        group.sort(key=lambda one: (-one[0], one[1].text, one[1].task, one[1].doc_id, one[1].idx))
        for start in range(0, len(group), size):
            yield [question for _, question in group[start : start + size]]


def prompt_tokens(
    questions: Sequence[Question], builder: PromptBuilder, scope: str, cache: PictureCache, pixels: float = 1.0
) -> list[int]:
    """Tokens of each question's prompt, visual ones included, without decoding its pictures.

    Exact for prompts with one picture; an overestimate if a processor treats several pictures in a prompt differently
    (LLaVA-OneVision). For videos as in their files' headers, without the text that a processor writes between frames.

    Args:
        scope: See `scope_of`.

    The others are as in `planned`.

    Raises:
        QuestionError: If a question's prompt cannot be made.
    """
    texts, pictures, films = [], [], []
    for question in questions:
        with blame([question]):
            seen = glance(question, scope, cache)
            frames, videos = builder.videos.outline(seen.films, pixels)
            sizes = (*seen.sizes, *frames)
            prompt = builder.render(question.text, len(sizes), videos)
            texts.append(prompt if question.continuation is None else f"{prompt} {question.continuation}")
            pictures.append(sizes)
            films.append(sum(number - 1 for number in builder.video_tokens(videos)))
    different = sorted({size for sizes in pictures for size in sizes})
    visual = dict(zip(different, builder.visual_tokens(different, pixels)))
    text = builder.text_tokens(texts)
    return [
        length + sum(visual[size] - 1 for size in sizes) + film for length, sizes, film in zip(text, pictures, films)
    ]


def scope_of(spec: RunSpec) -> str:
    """What decides which pictures a document of a task has, in addition to its data."""
    return f"{spec.task_files} {spec.wrapper}"


def check_arguments(planned: Iterable[Sequence[Question]], spec: RunSpec) -> None:
    """Refuse generation arguments that are not supported, before anything is asked.

    Raises:
        QuestionError: Naming the task and the documents.
    """
    for batch in planned:
        with blame(batch):
            GenerationArguments.parse(batch[0].arguments).options(spec.answer_tokens(batch[0].task))


@contextmanager
def blame(questions: Sequence[Question]) -> Iterator[None]:
    """Turn any exception into a QuestionError that names the task and the documents it happened with.

    Raises:
        QuestionError: With the cause chained.
    """
    try:
        yield
    except (KeyboardInterrupt, GeneratorExit, QuestionError):
        raise
    except BaseException as error:  # a task that calls sys.exit has failed too
        documents = ", ".join(str(question.doc_id) for question in questions)
        advice = "; use a smaller batch_size" if isinstance(error, torch.OutOfMemoryError) else ""
        raise QuestionError(f"task {questions[0].task}, doc_id {documents}: {described(error)}{advice}") from error
