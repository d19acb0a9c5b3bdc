"""The samples of a run, one class for one sample, from either form that pdrop/samples.py reads.

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
    """What the query tokens of one sample attend to, for each layer that was looked at.

    Attributes:
        layers: The layers, rising.
        mass: Share of each head's attention that goes to visual tokens, [layers, heads].
        entropy: Of it among the visual tokens, over the log of their number, [layers, heads].
        top: Share of it that the best attended tenth of them gets, [layers, heads].
        maps: Attention of each visual token, mean over the heads, each layer's largest 1, [layers, visual tokens].
    """

    layers: tuple[int, ...]
    mass: FloatArray
    entropy: FloatArray
    top: FloatArray
    maps: FloatArray


@dataclass(frozen=True)
class Sample:
    """One sample: what was asked, expected and answered, and what was kept of its visual tokens.

    Attributes:
        doc_id: Of the document, as text.
        prompt, question, target, answer: What was rendered, asked, expected and given.
        scores: By metric: the sample's own number, where it has one.
        parts: By metric that is no plain mean: numerator, denominator, stratum (pdrop/evaluation/metrics.py).
        score: Of the task's main metric; None where a sample alone has none.
        image: Its image's id, or a hash.
        visual_tokens: Of the prompt.
        masks: One hexadecimal bit mask per boundary (pdrop/evaluation/answers.py).
        layout: Places of the visual tokens in the pictures (pdrop/evaluation/pictures.py).
        attention: Where the run was a study of attention.
        number: The document's number, where it is one.
        group: What samples that are scored together share.
        invalid: Whether no rule of the task reads the answer; None where that was not looked at.
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
        """One mask [visual_tokens] per boundary."""
        return tuple(unpack(mask, self.visual_tokens) for mask in self.masks)


def read(folder: Path, record: RunRecord, task: str, most: int | None = None) -> list[Sample]:
    """A task's samples, in the file's order.

    Args:
        folder: The run's.
        record: The run's.
        task: The task.
        most: The first so many alone.

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
    """A sample from its fields; `metric` is the one that its score is of.

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
    """What pdrop.evaluation.answers.pack_attention wrote.

    Raises:
        ValueError: If a layer has another number of visual tokens.
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
    """The number that a hexadecimal mask is.

    Raises:
        ValueError: If the mask has a bit after the last token.
    """
    number = int(mask, 16)
    if number >> tokens:
        raise ValueError(f"mask {mask} names a token after the last of {tokens}")
    return number
