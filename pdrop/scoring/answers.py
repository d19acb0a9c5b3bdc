"""Questions, answers, and the store that lets a killed run go on where it stopped.

`answers.jsonl` in a run's folder gets one line an answered request, appended and flushed after every batch. The
folder belongs to one run (its name holds the hash of everything that can change a number), so an answer's key is what
was asked: task, document, prompt, generation arguments and the document's data. A second start asks only what is
missing. A last line that a kill cut short is dropped.

`kept` holds one bit mask a boundary, in hexadecimal: bit j of the number says whether visual token j was kept, so
token 0 is the lowest bit of the last digit. `unpack` gives the indices back.

    import json; [json.loads(line)["text"] for line in open("results/runs/.../answers.jsonl")]

No torch, no lmms-eval.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from pdrop.record import canonical_json

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Question:
    """One request of a task.

    Attributes:
        task, doc_id: Which document.
        idx: Which of the document's requests (choices of a multiple-choice task, repeats).
        text: The task's text.
        images: Gives the images, decoded only when they are needed.
        arguments: The task's generation arguments (max_new_tokens, until, do_sample, ...).
        continuation: The answer whose likelihood is asked for; None: generate one.
        data: Hash of the document, pixels included.
    """

    task: str
    doc_id: int
    idx: int
    text: str
    images: Callable[[], Sequence[Any]]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    continuation: str | None = None
    data: str = ""

    @cached_property
    def key(self) -> str:
        """24 hex digits: equal exactly when the same is asked."""
        asked = [self.task, self.doc_id, self.idx, self.text, dict(self.arguments), self.continuation, self.data]
        return hashlib.sha256(canonical_json(asked).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Answer:
    """What came back for one question, with what the prefill saw.

    Attributes:
        prompt: The rendered prompt, image tokens unexpanded.
        text: The generated answer; "" for a likelihood.
        loss: Mean negative log-likelihood a token of the continuation, its end token included (nats).
        greedy: Whether greedy decoding would have given the continuation.
        text_tokens, visual_tokens: Of the prompt (and of the continuation).
        answer_tokens: Generated or scored tokens.
        visual_per_layer: Visual tokens that entered each layer.
        kept: One hexadecimal bit mask a boundary.
    """

    prompt: str
    text: str
    text_tokens: int
    visual_tokens: int
    answer_tokens: int
    visual_per_layer: list[int]
    kept: list[str]
    loss: float | None = None
    greedy: bool | None = None


def pack(indices: Iterable[int]) -> str:
    """Hexadecimal bit mask with a bit set for each index."""
    mask = 0
    for index in indices:
        mask |= 1 << index
    return f"{mask:x}"


def unpack(mask: str) -> list[int]:
    """The indices behind a bit mask of `pack`, ascending."""
    bits = bin(int(mask, 16))[:1:-1]
    return [index for index, bit in enumerate(bits) if bit == "1"]


class AnswerStore:
    """The answers of one run, in memory and in an append-only file.

    Raises:
        ValueError: If the file holds lines that are no answers (a half last line is what a kill leaves, and is cut
            off; anything else is not ours).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._answers: dict[str, Answer] = {}
        names = {f.name for f in fields(Answer)}
        data = path.read_bytes() if path.exists() else b""
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            log.warning("%s: the last line was cut short by a kill; that question is asked again", path)
            with path.open("r+b") as file:
                file.truncate(whole)
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                entry = json.loads(line)
                key, answer = entry["key"], Answer(**{name: entry[name] for name in names})
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number} is no answer of this version: move the folder away") from error
            self._answers[key] = answer

    def __contains__(self, question: Question) -> bool:
        return question.key in self._answers

    def __getitem__(self, question: Question) -> Answer:
        return self._answers[question.key]

    def __len__(self) -> int:
        return len(self._answers)

    def add(self, answered: Iterable[tuple[Question, Answer]]) -> None:
        """Keep a batch of answers: on disk when this returns, even if the process is killed right after."""
        lines = []
        for question, answer in answered:
            self._answers[question.key] = answer
            where = {"key": question.key, "task": question.task, "doc_id": question.doc_id, "idx": question.idx}
            lines.append(json.dumps(where | asdict(answer), allow_nan=False) + "\n")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf8") as file:
            file.write("".join(lines))
