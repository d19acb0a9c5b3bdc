"""Which visual tokens each sample of a run kept, and what it answered: read from samples/<task>.jsonl.

sample = samples_of(run, "embedded_chart")["17"]
sample.kept[0]          # [visual_tokens] bool: kept at the first boundary; token 0 is the prompt's first visual one
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pdrop.record import read_lines

from .load import Run

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]
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
    """One sample: what was asked, expected and answered, and one mask [visual_tokens] a boundary."""

    doc_id: str
    prompt: str
    question: str
    target: str
    answer: str
    score: float | None  # of the task's main metric
    image: str | None  # its image's id, or a hash
    visual_tokens: int
    kept: tuple[BoolArray, ...]
    layout: Layout | None = None  # where the tokens lie in the pictures (pdrop/scoring/layout.py)
    attention: Attention | None = None  # where the run was a study of attention


def samples_of(run: Run, task: str) -> dict[str, Sample]:
    """The samples of a task by doc_id, in the file's order.

    Raises:
        ValueError: If the run has no such task, or its file is missing or holds something else.
    """
    if task not in run.record.results:
        raise ValueError(f"{run.folder} has no task {task!r}; it has {', '.join(run.record.results) or 'none'}")
    path = run.path / "samples" / f"{task}.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} is missing: run {run.record.run_id} again with force=true")
    metric, found = run.record.results[task].main_metric, {}
    for number, line in enumerate(read_lines(path), start=1):
        try:
            sample = parse(json.loads(line), metric)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number} does not say which tokens were kept ({error!r})") from error
        found[sample.doc_id] = sample
    return found


def parse(data: Mapping[str, Any], metric: str) -> Sample:
    """One line of a samples file."""
    tokens, score = int(data["visual_tokens"]), data["scores"].get(metric)
    answer = data["answer"]
    return Sample(
        doc_id=str(data["doc_id"]),
        prompt=str(data.get("prompt", "")),
        question=str(data["question"]),
        target=str(data["target"]),
        answer="(likelihoods)" if answer is None else " | ".join(answer) if isinstance(answer, list) else str(answer),
        score=None if score is None else float(score),
        image=None if data.get("image") is None else str(data["image"]),
        visual_tokens=tokens,
        kept=tuple(unpack(mask, tokens) for mask in data["kept"]),
        layout=data.get("layout"),
        attention=None if data.get("attention") is None else read_attention(data["attention"], tokens),
    )


def read_attention(data: Mapping[str, Any], tokens: int) -> Attention:
    """What pdrop.scoring.answers.pack_attention wrote.

    Raises:
        ValueError: If a layer has another number of visual tokens.
    """
    maps = [np.frombuffer(base64.b64decode(text), dtype="<f2") for text in data["map"]]
    if any(len(one) != tokens for one in maps):
        raise ValueError(f"an attention map of {sorted({len(one) for one in maps})} tokens, not {tokens}")
    mass, entropy, top = (np.array(data[name], dtype=np.float64) for name in ("mass", "entropy", "top"))
    return Attention(tuple(data["layers"]), mass, entropy, top, np.array(maps, dtype=np.float64))


def unpack(mask: str, tokens: int) -> BoolArray:
    """A hexadecimal bit mask, bit j for visual token j, as [tokens] bool.

    Raises:
        ValueError: If the mask has a bit behind the last token.
    """
    number = int(mask, 16)
    if number >> tokens:
        raise ValueError(f"mask {mask} names a token behind the last of {tokens}")
    packed = np.frombuffer(number.to_bytes(tokens // 8 + 1, "little"), dtype=np.uint8)
    return np.unpackbits(packed, count=tokens, bitorder="little").astype(np.bool_)
