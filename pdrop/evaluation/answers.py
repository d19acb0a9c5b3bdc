"""Questions, answers, and the store from which a killed run resumes.

`answers.jsonl` in a run's folder gets one line per answered request, appended and flushed after every batch. The
folder belongs to one run (its name has the hash of everything that can change a number), so an answer's key is what was
asked: task, document, prompt, generation arguments and the document's data. A second start asks only what is missing. A
line that a kill cut short is skipped, and of several lines with the same key the last one counts.

`kept` has one bit mask per boundary, in hexadecimal: bit j of the number says whether visual token j was kept, so token
0 is the lowest bit of the last digit. `unpack` returns the indices.

    import json; [json.loads(line)["text"] for line in open("results/runs/.../answers.jsonl")]

No torch, no lmms-eval.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pdrop.record import canonical_json
from pdrop.shapes import PromptSize
from pdrop.store import naming, open_in_place

log = logging.getLogger(__name__)

# a number of crops, or [frames, height, width] in patches for each image; None: not known
Seen = int | list[list[int]] | None
START = b'{"key": "'  # every line begins with it
SUM = re.compile(rb', "sum": "([0-9a-f]{8})"\}\s*\Z')  # at a line's end: CRC-32 of the line without it


@dataclass(frozen=True, eq=False)
class Question:
    """One request of a task.

    Attributes:
        task, doc_id: The document.
        idx: Number of the request among the document's (choices of a multiple-choice task, repeats).
        text: The task's text.
        images: Function that returns the images, which are decoded only when needed.
        arguments: The task's generation arguments (max_new_tokens, until, do_sample, ...).
        continuation: The answer whose likelihood is asked for; None: generate an answer.
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
        """24 hex digits, equal exactly for equal questions."""
        asked = [self.task, self.doc_id, self.idx, self.text, dict(self.arguments), self.continuation, self.data]
        return hashlib.sha256(canonical_json(asked).encode()).hexdigest()[:24]


def described(error: BaseException | None) -> str:
    """An exception in one line: its type and message, or that the code tried to exit."""
    if isinstance(error, SystemExit):
        return f"it called sys.exit({error.code!r})"
    return f"{type(error).__name__}: {error}"


class QuestionError(RuntimeError):
    """A question failed; the message names its task and document."""


@dataclass(frozen=True)
class Answer:
    """The answer to one question, with what its prefill recorded.

    Attributes:
        prompt: The rendered prompt, image tokens unexpanded.
        text: The generated answer; "" for a likelihood.
        loss: Mean negative log-likelihood per token of the continuation, its end token included (nats).
        greedy: Whether greedy decoding would have given the continuation.
        text_tokens, visual_tokens: Tokens of the prompt (and of the continuation).
        answer_tokens: Generated or scored tokens.
        visual_per_layer: Visual tokens that entered each layer.
        images: What went through the vision tower (pdrop/evaluation/pictures.py).
        kept: One hexadecimal bit mask per boundary.
        layout: Where the visual tokens are in the pictures (pdrop/evaluation/pictures.py).
        attention: If nothing is dropped but every layer ranks: see `pack_attention`.
    """

    prompt: str
    text: str
    text_tokens: int
    visual_tokens: int
    answer_tokens: int
    visual_per_layer: list[int]
    kept: list[str]
    images: Seen = None
    loss: float | None = None
    greedy: bool | None = None
    layout: list[list[list[float]]] | None = None
    attention: dict[str, Any] | None = None

    @property
    def size(self) -> PromptSize:
        """The numbers of its prompt."""
        images: Any = self.images
        return PromptSize(self.text_tokens, self.visual_tokens, tuple(self.visual_per_layer), images)


def pack(indices: Iterable[int]) -> str:
    """Hexadecimal bit mask with a bit set for each index."""
    mask = 0
    for index in indices:
        mask |= 1 << index
    return f"{mask:x}"


def unpack(mask: str) -> list[int]:
    """The indices of the bits set in a mask made by `pack`, ascending."""
    bits = bin(int(mask, 16))[:1:-1]
    return [index for index, bit in enumerate(bits) if bit == "1"]


def answered_by(store: AnswerStore, questions: Iterable[Question]) -> list[dict[str, Any]]:
    """Who answered what: {"device", for a worker also "host" and "pid", "documents": {task: bit mask of doc_ids}}."""
    found: dict[str, dict[str, set[int]]] = {}
    for question in questions:
        who = canonical_json(store.by.get(question.key, {}))
        found.setdefault(who, {}).setdefault(question.task, set()).add(question.doc_id)
    return [
        {**json.loads(who), "documents": {task: pack(ids) for task, ids in sorted(tasks.items())}}
        for who, tasks in sorted(found.items())
    ]


def pack_attention(layers: Sequence[Any]) -> dict[str, Any] | None:
    """The query tokens' attention for JSON, from pdrop.engine.study.LayerAttention; None without layers.

    {"layers": [0, 1, ...], "mass", "entropy", "top": a list over layers of a list over heads, four digits;
    "map": a list over layers of base64 of little-endian float16, attention of each visual token / the largest}.
    """
    if not layers:
        return None
    found: dict[str, Any] = {"layers": [entry.layer for entry in layers]}
    for name in ("mass", "entropy", "top"):
        found[name] = [[round(value, 4) for value in getattr(entry, name)] for entry in layers]
    found["map"] = []
    for entry in layers:
        weights = entry.weights.numpy()
        scaled = weights / max(float(weights.max(initial=0)), 1e-30)
        found["map"].append(base64.b64encode(scaled.astype("<f2").tobytes()).decode())
    return found


def proven(line: bytes) -> bool:
    """Whether the checksum at a line's end proves it intact; lines of older runs, and torn lines, have none."""
    found = SUM.search(line)
    return found is None or zlib.crc32(line[: found.start()] + b"}") == int(found[1], 16)


class AnswerStore:
    """The answers of one run, in memory and in an append-only file.

    Reading does not change the file: what looks cut short may be a line that another process is writing.

    Raises:
        ValueError: If the file has lines that are not answers (the beginning of an answer is what a kill leaves, and is
            skipped; anything else was not written here).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._answers: dict[str, Answer] = {}
        self.by: dict[str, dict[str, Any]] = {}  # key -> who answered
        names = {f.name for f in fields(Answer)}
        data = path.read_bytes() if path.exists() else b""
        for number, written in enumerate(data.split(b"\n"), start=1):
            if not written:
                continue
            line = written.strip(b"\0")  # a power cut leaves zeros for a line that was not on the disk yet
            if not line or not proven(line):
                what = "does not hold what was written" if line else "is empty after a power cut"
                log.warning("%s, line %d %s; what it answered is asked again", path, number, what)
                continue
            try:
                entry = json.loads(line)
                key, answer = entry["key"], Answer(**{name: entry[name] for name in names})
            except (ValueError, KeyError, TypeError) as error:
                if isinstance(error, ValueError) and (line.startswith(START) or START.startswith(line)):
                    log.warning("%s, line %d was cut short by a kill; what it answered is asked again", path, number)
                    continue
                raise ValueError(
                    f"{path}, line {number} is not an answer of this version: move the folder away"
                ) from error
            self._answers[key], self.by[key] = answer, entry.get("by") or {}

    def __contains__(self, question: Question) -> bool:
        return question.key in self._answers

    def __getitem__(self, question: Question) -> Answer:
        return self._answers[question.key]

    def __len__(self) -> int:
        return len(self._answers)

    def add(self, answered: Iterable[tuple[Question, Answer]], by: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Store a batch of answers: on disk when this returns, even if the process is killed right after.

        Args:
            answered: Each question with its answer.
            by: Who answered: the device's name, and for a worker its host and process.
        """
        lines = []
        for question, answer in answered:
            self._answers[question.key], self.by[question.key] = answer, dict(by)
            where = {"key": question.key, "task": question.task, "doc_id": question.doc_id, "idx": question.idx}
            line = json.dumps(where | asdict(answer) | {"by": dict(by)}, allow_nan=False)
            lines.append(f'{line[:-1]}, "sum": "{zlib.crc32(line.encode()):08x}"}}\n')
        handle = open_in_place(self.path, os.O_RDWR | os.O_APPEND)
        # one write for the batch, so that two writers do not mix
        with naming(self.path), os.fdopen(handle, "a+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            cut_short = size > 0 and file.read(1) != b"\n"
            data = ("\n" * cut_short + "".join(lines)).encode()
            while data:
                data = data[file.write(data) :]
