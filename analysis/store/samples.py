"""The samples of a run, one object per sample, from both forms that pdrop/samples.py reads.

sample = read(run.path, run.record, "embedded_chart")[17]
sample.kept[0]          # [visual_tokens] bool: kept at the first boundary; token 0 is the prompt's first visual one
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pdrop.record import RunRecord
from pdrop.samples import read_samples, samples_file, verify

from ..statistics import FloatArray

BoolArray = npt.NDArray[np.bool_]
LIKELIHOODS = "(likelihoods)"  # instead of an answer, where those of given ones were compared
Layout = list[list[list[float]]]  # pictures -> blocks -> rows, columns, newline, left, top, right, bottom


@dataclass(frozen=True)
class Attention:
    """The attention of one sample's query tokens, for each layer that was recorded.

    Attributes:
        layers: The layers, rising.
        mass: Share of each head's attention that goes to visual tokens, [layers, heads].
        entropy: The entropy of that attention over the visual tokens / the log of their number, [layers, heads].
        top: The share of it on the best attended tenth of them, [layers, heads].
        maps: Attention of each visual token, mean over the heads, each layer's largest 1, [layers, visual tokens].
    """

    layers: tuple[int, ...]
    mass: FloatArray
    entropy: FloatArray
    top: FloatArray
    maps: FloatArray


@dataclass(frozen=True)
class Sample:
    """One sample: question, expected and given answer, and which of its visual tokens were kept.

    Attributes:
        doc_id: The document's id, as text.
        prompt, question, target, answer: The rendered prompt, the question, the expected and the given answer.
        scores: By metric: the sample's own number, if it has one.
        parts: By metric that is not a plain mean: numerator, denominator, stratum (pdrop/evaluation/metrics.py).
        score: The score of the task's main metric; None if a single sample has none.
        image: Its image's id, or a hash.
        visual_tokens: The number of visual tokens of the prompt.
        masks: One hexadecimal bit mask per boundary (pdrop/evaluation/answers.py).
        layout: Places of the visual tokens in the pictures (pdrop/evaluation/pictures.py).
        attention: The attention, if the run recorded it.
        number: The document's id as a number, if it is one.
        group: The group of samples that are scored together.
        invalid: Whether no rule of the task reads the answer; None if that was not checked.
    """

    doc_id: str
    prompt: str
    question: str
    target: str
    answer: str
    score: float | None
    image: str | None
    visual_tokens: int
    masks: tuple[str, ...]
    layout: Layout | None = None
    attention: Attention | None = None
    number: int | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, tuple[float, float, str]] = field(default_factory=dict)
    group: str | None = None
    invalid: bool | None = None

    @cached_property
    def kept(self) -> tuple[BoolArray, ...]:
        """The kept visual tokens as one bool mask [visual_tokens] per boundary."""
        return tuple(unpack(mask, self.visual_tokens) for mask in self.masks)


def read(folder: Path, record: RunRecord, task: str, most: int | None = None) -> list[Sample]:
    """A task's samples, in the file's order.

    Args:
        folder: The run's.
        record: The run's.
        task: The task.
        most: Only this many, from the first on.

    Raises:
        ValueError: If the run has no such task, or its file is missing or holds something else.
    """
    if task not in record.results:
        raise ValueError(f"{folder.name} has no task {task!r}; it has {', '.join(record.results) or 'none'}")
    verify(folder, record.samples_digest)
    metric, found = record.results[task].main_metric, []
    for number, data in enumerate(read_samples(folder, task, most), start=1):
        try:
            found.append(parse(data, metric))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            where = f"{samples_file(folder, task)}, sample {number}"
            raise ValueError(
                f"{where} does not say what was answered, or which tokens were kept ({error!r})"
            ) from error
    return found


def parse(data: Mapping[str, Any], metric: str) -> Sample:
    """A sample from its fields; `score` is that of `metric`.

    Raises:
        KeyError, TypeError, ValueError: If a field is missing or something else.
    """
    tokens, score, doc_id = int(data["visual_tokens"]), data["scores"].get(metric), data["doc_id"]
    answer, masks = data["answer"], tuple(data["kept"])
    for mask in masks:
        bits(mask, tokens)
    return Sample(
        doc_id=str(doc_id),
        prompt=str(data.get("prompt", "")),
        question=str(data["question"]),
        target=str(data["target"]),
        answer=LIKELIHOODS if answer is None else " | ".join(answer) if isinstance(answer, list) else str(answer),
        score=float(score) if isinstance(score, (int, float)) else None,
        image=None if data.get("image") is None else str(data["image"]),
        visual_tokens=tokens,
        masks=masks,
        layout=data.get("layout"),
        attention=None if data.get("attention") is None else read_attention(data["attention"], tokens),
        number=doc_id if isinstance(doc_id, int) else None,
        scores={name: float(one) for name, one in data["scores"].items() if isinstance(one, (int, float))},
        parts={name: (float(a), float(b), str(s)) for name, (a, b, s) in (data.get("parts") or {}).items()},
        group=None if data.get("group") is None else str(data["group"]),
        invalid=data["read"] is None if "read" in data else None,
    )


def read_attention(data: Mapping[str, Any], tokens: int) -> Attention:
    """The attention as pdrop.evaluation.answers.pack_attention wrote it.

    Raises:
        ValueError: If a layer has a different number of visual tokens.
    """
    maps = [np.frombuffer(base64.b64decode(text), dtype="<f2") for text in data["map"]]
    if any(len(one) != tokens for one in maps):
        raise ValueError(f"an attention map of {sorted({len(one) for one in maps})} tokens, not {tokens}")
    mass, entropy, top = (np.array(data[name], dtype=np.float64) for name in ("mass", "entropy", "top"))
    return Attention(tuple(data["layers"]), mass, entropy, top, np.array(maps, dtype=np.float64))


def unpack(mask: str, tokens: int) -> BoolArray:
    """A hexadecimal bit mask, bit j for visual token j, as [tokens] bool (see `bits`)."""
    number = bits(mask, tokens)
    packed = np.frombuffer(number.to_bytes(tokens // 8 + 1, "little"), dtype=np.uint8)
    return np.unpackbits(packed, count=tokens, bitorder="little").astype(np.bool_)


def bits(mask: str, tokens: int) -> int:
    """A hexadecimal mask as a number.

    Raises:
        ValueError: If the mask has a bit after the last token.
    """
    number = int(mask, 16)
    if number >> tokens:
        raise ValueError(f"mask {mask} names a token after the last of {tokens}")
    return number
