"""Answer questions with a checkpoint while a method drops visual tokens. Knows nothing of lmms-eval.

Questions are asked in batches that depend on the questions alone, never on what has been answered before
(pdrop/evaluation/batching.py): a run that was killed and started again asks each question in the same batch as an
undisturbed run. The next batches are prepared while the model answers (pdrop/evaluation/prefetch.py).

An exception is never swallowed or replaced by an empty answer: it becomes a QuestionError that names task and document.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pdrop.engine import attach
from pdrop.environment import accelerator
from pdrop.evaluation.answers import Answer, AnswerStore, Question, pack, pack_attention
from pdrop.evaluation.batching import blame, planned, scope_of
from pdrop.evaluation.generation_arguments import GenerationArguments
from pdrop.evaluation.picture_cache import of_process
from pdrop.evaluation.pictures import layout_of, pictures_of, tower_of
from pdrop.evaluation.prefetch import Preparation, ahead
from pdrop.evaluation.progress import Progress
from pdrop.evaluation.prompts import PromptBuilder
from pdrop.evaluation.rows import PromptPictures
from pdrop.methods.base import Method
from pdrop.methods.transfer import moved, read_back
from pdrop.models.attention import sdpa_order
from pdrop.models.checkpoint import Checkpoint
from pdrop.record import RunSpec
from pdrop.schedule import Schedule


@dataclass
class Answered:
    """Answers in the order of the questions, and how many of them were asked now and how many were in the store."""

    answers: list[Answer]
    asked: int
    reused: int


@dataclass(frozen=True)
class Prepared:
    """The inputs of questions that are asked in one forward.

    Attributes:
        questions: All with images, or all with videos, or all with neither.
        prompts: Rendered.
        inputs: The processor's output, padded; floating tensors in the model's dtype, on the host until they are asked.
        sizes: For each question, (width, height) of its pictures.
        videos: For each question, (width, height) and number of frames of its videos.
        lengths: Tokens of the answers whose likelihood is asked for; None: answers are generated.
    """

    questions: list[Question]
    prompts: list[str]
    inputs: Any
    sizes: list[list[tuple[int, int]]]
    videos: list[list[tuple[tuple[int, int], int]]]
    lengths: list[int] | None


class Generator:
    """Answers questions with one checkpoint under one method and schedule, as a spec says.

    Args:
        checkpoint: Loaded model and processor.
        method: Ranks the visual tokens; None with an empty schedule.
        schedule: Where and how many.
        spec: How to ask: prompts, pictures, lengths and so on.
        preparation: How inputs are prepared ahead and cached; None: as in conf/run.yaml.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        method: Method | None,
        schedule: Schedule,
        spec: RunSpec,
        preparation: Preparation | None = None,
    ) -> None:
        preparation = preparation or Preparation()
        longest = checkpoint.model.config.get_text_config(decoder=True).max_position_embeddings
        self.model, self.tokenizer = checkpoint.model, checkpoint.processor.tokenizer
        self.method, self.schedule, self.spec = method, schedule, spec
        self.by = {"device": accelerator(str(self.model.device))["device_name"]}
        self.depth = preparation.depth(self.model.device.type)
        self.cache = of_process(preparation.cache_bytes)
        self.builder = PromptBuilder.of(checkpoint, spec, longest)
        if self.depth:  # preparing threads get their own tokenizer: this one is used at the same time
            self.builder.processor = copy.copy(self.builder.processor)
            self.builder.processor.tokenizer = checkpoint.second_tokenizer
        self.pixels = method.pixels if method is not None else 1.0

    def answer(
        self, questions: Sequence[Question], store: AnswerStore | None = None, progress: Progress | None = None
    ) -> Answered:
        """Ask the questions whose answers are not in the store, attached once, storing after every batch.

        Raises:
            QuestionError: If a question fails; it names the task and the documents.
        """
        answers: dict[str, Answer] = {q.key: store[q] for q in questions if store is not None and q in store}
        batches, asked, done = planned(questions, self.builder, self.spec, self.cache, self.pixels), 0, 0
        # a prompt's batch affects the last bits of its numbers: if a kill inside a write left some
        # answers of a part, the whole part is asked again
        known = [all(question.key in answers for question in batch) for batch in batches]
        wanted = [batch for batch, there in zip(batches, known) if not there]
        with closing(ahead(self.prepare, wanted, self.depth)) as ready, self.attached() as trace:
            for batch, there in zip(batches, known):
                for part in [] if there else next(ready):
                    if all(question.key in answers for question in part.questions):
                        continue
                    answered = self.ask(part, trace)
                    answers |= {question.key: found for question, found in zip(part.questions, answered)}
                    asked += len(answered)
                    if store is not None:
                        store.add(zip(part.questions, answered), self.by)
                done += len(batch)
                if progress is not None:
                    progress(batch[0].task, done, len(questions))
        return Answered([answers[question.key] for question in questions], asked, len(questions) - asked)

    def prepare(self, questions: Sequence[Question]) -> list[Prepared]:
        """The model's inputs for a batch; the model itself is not used. Thread-safe.

        Returns:
            A part for questions with images, one with videos, one with neither: processors take no batch that mixes
            them.

        Raises:
            QuestionError: As `answer` does.
        """
        split: dict[tuple[int, ...], list[tuple[Question, str, PromptPictures]]] = defaultdict(list)
        for question in questions:
            with blame([question]):
                row = PromptPictures.of(question, scope_of(self.spec), self.cache, self.builder.videos, self.pixels)
                prompt = self.builder.render(question.text, len(row.contents), row.videos)
                split[self.builder.videos.kind(len(row.contents), row.videos)].append((question, prompt, row))
        found = []
        for _, rows in sorted(split.items()):
            part = [question for question, _, _ in rows]
            with blame(part):
                found.append(self._prepared(part, [prompt for _, prompt, _ in rows], [row for _, _, row in rows]))
        return found

    def _prepared(self, questions: list[Question], prompts: list[str], rows: list[PromptPictures]) -> Prepared:
        joined, lengths = prompts, None
        if questions[0].continuation is not None:
            ends = [f"{question.continuation}{self.tokenizer.eos_token}" for question in questions]
            joined = [f"{prompt} {end.lstrip()}" for prompt, end in zip(prompts, ends)]
            lengths = [self.builder.answer_length(p, both[len(p) :]) for p, both in zip(prompts, joined)]
        inputs = self.builder.encode_rows(joined, rows, self.cache, self.pixels, self.model.dtype)
        inputs = inputs.to(self.model.dtype)  # floating tensors only, and before they are copied to the device
        videos = [[(video.size, len(video.places)) for video in row.videos] for row in rows]
        return Prepared(questions, prompts, inputs, [row.sizes for row in rows], videos, lengths)

    @contextmanager
    def attached(self) -> Iterator[Any]:
        """The model with its method attached; yields the trace."""
        drops = attach(self.model, self.method, self.schedule, tokenizer=self.tokenizer)
        with torch.inference_mode(), sdpa_order(self.spec.sdpa_kernel), drops as trace:
            trace.study = True  # if the schedule drops nothing: the attention, a few numbers per layer
            yield trace

    def ask(self, part: Prepared, trace: Any) -> list[Answer]:
        """The answers of a part, inside `attached`.

        Raises:
            QuestionError: As `answer` does.
        """
        with blame(part.questions):
            trace.samples = [question.data for question in part.questions]
            for name, value in part.inputs.items():
                if isinstance(value, Tensor):
                    part.inputs[name] = moved(value, self.model.device)
            return self._generate(part, trace) if part.lengths is None else self._score(part, part.lengths, trace)

    def _generate(self, part: Prepared, trace: Any) -> list[Answer]:
        questions, inputs = part.questions, part.inputs
        arguments, before = GenerationArguments.parse(questions[0].arguments), trace.prefills
        if arguments.samples:  # a batch is seeded by its first question, which depends on the questions alone
            torch.manual_seed(int(questions[0].key[:12], 16) ^ self.spec.seed)
        options = arguments.options(self.spec.answer_tokens(questions[0].task))
        output = self.model.generate(**inputs, **options, pad_token_id=self.tokenizer.pad_token_id)
        output = output[:, inputs["input_ids"].shape[1] :]
        self._check_prefills(trace, before)
        answers = []
        for prompt, tokens, prefill in zip(part.prompts, self._cut(output), self._observed(trace, part)):
            text = self.tokenizer.decode(tokens, skip_special_tokens=arguments.skip_special_tokens)
            for stop in arguments.until if self.spec.stop == "task" else ():
                text = text.split(stop)[0] if stop else text
            answers.append(Answer(prompt=prompt, text=text, answer_tokens=len(tokens), **prefill))
        return answers

    def _score(self, part: Prepared, lengths: Sequence[int], trace: Any) -> list[Answer]:
        """Likelihood of given answers, as in LLaVA's own evaluation: mean over the answer's tokens and its end token.

        The answer is passed as labels, so that tokens are ranked by the prompt's last token.
        """
        before, inputs = trace.prefills, part.inputs
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
        observed = self._observed(trace, part)
        for row, (length, prefill, loss, greedy) in enumerate(zip(lengths, observed, read[::2], read[1::2])):
            prefill["text_tokens"] -= length
            prefill |= {"loss": loss, "greedy": greedy, "answer_tokens": length}
            answers.append(Answer(prompt=part.prompts[row], text="", **prefill))
        return answers

    def _observed(self, trace: Any, part: Prepared) -> list[dict[str, Any]]:
        """The last prefill's record of each prompt, as fields of an Answer."""
        copies = len(trace.visual) // len(part.questions)  # the beams of a prompt are next to each other in the batch
        places = range(0, len(trace.visual), copies)
        read, mode, cropped = pictures_of(self.model, part.inputs), self.builder.image_mode, self.builder.cropped
        shown = [None] * len(part.questions) if read is None else read
        tokens, per_layer, kept, attention = trace.tokens, trace.visual_tokens, trace.kept, trace.attention
        return [
            {
                "text_tokens": tokens[0][place] - per_layer[0][place],
                "visual_tokens": trace.visual[place],
                "visual_per_layer": [layer[place] for layer in per_layer],
                "kept": [pack(boundary[place].tolist()) for boundary in kept],
                "images": None if pictures is None else tower_of(pictures),
                "layout": None if pictures is None else layout_of(pictures, own, mode, cropped[0], films, cropped[1]),
                "attention": pack_attention(attention[place]),
            }
            for place, pictures, own, films in zip(places, shown, part.sizes, part.videos)
        ]

    def _cut(self, output: Tensor) -> Iterator[list[int]]:
        """The tokens of each row up to and including its end token; padding follows."""
        ends = self.model.generation_config.eos_token_id
        stop = {ends} if isinstance(ends, int) else set(ends or ())
        for tokens in output.tolist():
            length = next((i + 1 for i, token in enumerate(tokens) if token in stop), len(tokens))
            yield tokens[:length]

    @staticmethod
    def _check_prefills(trace: Any, before: int) -> None:
        if trace.prefills != before + 1:
            raise RuntimeError(f"expected one prefill, saw {trace.prefills - before}: what was dropped is not known")
