"""Answer questions with a checkpoint while a method drops visual tokens. Knows nothing of lmms-eval.

Questions are asked in batches whose make-up depends on the questions alone, never on what has been answered before:
a run that was killed and started again gives every answer in the same company as an undisturbed one.

An exception is never swallowed, and no answer is ever made up: it becomes a QuestionError that names task and document.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pdrop.engine import attach
from pdrop.environment import accelerator
from pdrop.evaluation.answers import Answer, AnswerStore, Question, QuestionError, described, pack, pack_attention
from pdrop.evaluation.generation_arguments import GenerationArguments
from pdrop.evaluation.pictures import layout_of, pictures_of, tower_of
from pdrop.evaluation.progress import Progress
from pdrop.evaluation.prompts import PromptBuilder
from pdrop.methods.base import Method
from pdrop.methods.transfer import moved, read_back
from pdrop.models.attention import sdpa_order
from pdrop.models.checkpoint import Checkpoint
from pdrop.record import RunSpec, canonical_json
from pdrop.schedule import Schedule


@dataclass
class Answered:
    """Answers in the order of the questions, how many of them were asked now, how many were in the store."""

    answers: list[Answer]
    asked: int
    reused: int


class Generator:
    """One checkpoint under one method and schedule, asked as a spec says.

    Args:
        checkpoint: Loaded model and processor.
        method: What ranks the visual tokens; None with an empty schedule.
        schedule: Where and how many.
        spec: How: the fields of RunSpec that its use here names.
    """

    def __init__(self, checkpoint: Checkpoint, method: Method | None, schedule: Schedule, spec: RunSpec) -> None:
        longest = checkpoint.model.config.get_text_config(decoder=True).max_position_embeddings
        self.model, self.tokenizer = checkpoint.model, checkpoint.processor.tokenizer
        self.method, self.schedule, self.spec = method, schedule, spec
        self.pixels = method.pixels if method is not None else 1.0
        self.by = {"device": accelerator(str(self.model.device))["device_name"]}
        self.builder = PromptBuilder.of(checkpoint, spec, longest)

    @torch.inference_mode()
    def answer(
        self, questions: Sequence[Question], store: AnswerStore | None = None, progress: Progress | None = None
    ) -> Answered:
        """Ask what the store does not hold yet, attached once, storing after every batch.

        Raises:
            QuestionError: If anything goes wrong with a question; it names the task and the documents.
        """
        answers: dict[str, Answer] = {q.key: store[q] for q in questions if store is not None and q in store}
        asked, done, planned = 0, 0, list(batches(questions, self.spec.batch_size))
        check_arguments(planned, self.spec)
        drops = attach(self.model, self.method, self.schedule, tokenizer=self.tokenizer)
        with sdpa_order(self.spec.sdpa_kernel), drops as trace:
            trace.study = True  # if the schedule drops nothing: what is attended to, a few numbers a layer
            for batch in planned:
                # what a prompt shares its forward with moves the last bits: where a kill inside a write left some
                # answers of a part, all of it is asked again
                known = all(question.key in answers for question in batch)
                for part, prompts, images in [] if known else self._by_images(batch):
                    if all(question.key in answers for question in part):
                        continue
                    with blame(part):
                        trace.samples = [question.data for question in part]
                        if part[0].continuation is None:
                            answered = self._generate(part, prompts, images, trace)
                        else:
                            answered = self._score(part, prompts, images, trace)
                    answers |= {question.key: found for question, found in zip(part, answered)}
                    asked += len(part)
                    if store is not None:
                        store.add(zip(part, answered), self.by)
                done += len(batch)
                if progress is not None:
                    progress(batch[0].task, done, len(questions))
        return Answered([answers[question.key] for question in questions], asked, len(questions) - asked)

    def _by_images(self, questions: Sequence[Question]) -> Iterator[tuple[list[Question], list[str], list[list[Any]]]]:
        """The questions with images, those with videos, those without: processors take no batch that mixes them."""
        split: dict[tuple[int, ...], list[tuple[Question, str, list[Any]]]] = defaultdict(list)
        for question in questions:
            with blame([question]):
                prompt, images, kind = self.builder.ask(question.text, question.images(), self.pixels)
                split[kind].append((question, prompt, images))
        for _, rows in sorted(split.items()):
            yield [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]

    def _inputs(self, prompts: Sequence[str], images: Sequence[Sequence[Any]]) -> Any:
        inputs = self.builder.encode(prompts, images, self.pixels)
        inputs = inputs.to(self.model.dtype)  # floating tensors only, and before they travel
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                inputs[name] = moved(value, self.model.device)
        return inputs

    def _generate(
        self, questions: list[Question], prompts: list[str], images: list[list[Any]], trace: Any
    ) -> list[Answer]:
        arguments, before = GenerationArguments.parse(questions[0].arguments), trace.prefills
        inputs = self._inputs(prompts, images)
        if arguments.samples:  # a batch draws by its first question: the questions alone decide who that is
            torch.manual_seed(int(questions[0].key[:12], 16) ^ self.spec.seed)
        options = arguments.options(self.spec.answer_tokens(questions[0].task))
        output = self.model.generate(**inputs, **options, pad_token_id=self.tokenizer.pad_token_id)
        output = output[:, inputs["input_ids"].shape[1] :]
        self._check_prefills(trace, before)
        answers = []
        for prompt, tokens, prefill in zip(prompts, self._cut(output), self._observed(trace, inputs, images)):
            text = self.tokenizer.decode(tokens, skip_special_tokens=arguments.skip_special_tokens)
            for stop in arguments.until if self.spec.stop == "task" else ():
                text = text.split(stop)[0] if stop else text
            answers.append(Answer(prompt=prompt, text=text, answer_tokens=len(tokens), **prefill))
        return answers

    def _score(
        self, questions: list[Question], prompts: list[str], images: list[list[Any]], trace: Any
    ) -> list[Answer]:
        """Likelihood of given answers, as LLaVA's own evaluation has it: mean over the answer's tokens and its end.

        The answer is passed as labels, so that what is dropped is decided by the prompt's last token.
        """
        before = trace.prefills
        ends = [f"{question.continuation}{self.tokenizer.eos_token}" for question in questions]
        joined = [f"{prompt} {end.lstrip()}" for prompt, end in zip(prompts, ends)]
        inputs = self._inputs(joined, images)
        lengths = [self.builder.answer_length(p, both[len(p) :]) for p, both in zip(prompts, joined)]
        labels = torch.full_like(inputs["input_ids"], -100)
        for row, length in enumerate(lengths):
            labels[row, -length:] = inputs["input_ids"][row, -length:]
        logits = self.model(**inputs, labels=labels).logits
        self._check_prefills(trace, before)
        answers, found = [], []
        for row, length in enumerate(lengths):
            predicted, target = logits[row, -length - 1 : -1].float(), labels[row, -length:]
            found += [torch.nn.functional.cross_entropy(predicted, target), (predicted.argmax(-1) == target).all()]
        read = [value.item() for value in read_back(found)]
        observed = self._observed(trace, inputs, images)
        for row, (length, prefill, loss, greedy) in enumerate(zip(lengths, observed, read[::2], read[1::2])):
            prefill["text_tokens"] -= length
            prefill |= {"loss": loss, "greedy": greedy, "answer_tokens": length}
            answers.append(Answer(prompt=prompts[row], text="", **prefill))
        return answers

    def _observed(self, trace: Any, inputs: Any, images: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
        """What the last prefill saw of each prompt, as fields of an Answer; `images` has one entry per prompt."""
        copies = len(trace.visual) // len(images)  # beams stand side by side in the batch
        places = range(0, len(trace.visual), copies)
        read, mode = pictures_of(self.model, inputs), self.builder.image_mode
        cropped = self.builder.cropped
        shown = [None] * len(images) if read is None else read
        tokens, per_layer, kept, attention = trace.tokens, trace.visual_tokens, trace.kept, trace.attention
        return [
            {
                "text_tokens": tokens[0][place] - per_layer[0][place],
                "visual_tokens": trace.visual[place],
                "visual_per_layer": [layer[place] for layer in per_layer],
                "kept": [pack(boundary[place].tolist()) for boundary in kept],
                "images": None if pictures is None else tower_of(pictures),
                "layout": None if pictures is None else layout_of(pictures, own, mode, *cropped),
                "attention": pack_attention(attention[place]),
            }
            for place, pictures, own in zip(places, shown, images)
        ]

    def _cut(self, output: Tensor) -> Iterator[list[int]]:
        """The tokens of each row up to and with its end token; after it there is padding."""
        ends = self.model.generation_config.eos_token_id
        stop = {ends} if isinstance(ends, int) else set(ends or ())
        for tokens in output.tolist():
            length = next((i + 1 for i, token in enumerate(tokens) if token in stop), len(tokens))
            yield tokens[:length]

    @staticmethod
    def _check_prefills(trace: Any, before: int) -> None:
        if trace.prefills != before + 1:
            raise RuntimeError(f"expected one prefill, saw {trace.prefills - before}: what was dropped is not known")


def batches(questions: Iterable[Question], size: int) -> Iterator[list[Question]]:
    """Batches of equal generation arguments, longest text first, in an order that the questions alone decide."""
    groups: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        groups[canonical_json([question.continuation is None, dict(question.arguments)])].append(question)
    for _, group in sorted(groups.items()):
        group.sort(key=lambda q: (-len(q.text), q.text, q.task, q.doc_id, q.idx))
        for start in range(0, len(group), size):
            yield group[start : start + size]


def check_arguments(planned: Iterable[Sequence[Question]], spec: RunSpec) -> None:
    """Refuse what cannot be honoured, before anything is asked.

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
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # a task that calls sys.exit has failed, too
        documents = ", ".join(str(question.doc_id) for question in questions)
        advice = "; use a smaller batch_size" if isinstance(error, torch.OutOfMemoryError) else ""
        raise QuestionError(f"task {questions[0].task}, doc_id {documents}: {described(error)}{advice}") from error
