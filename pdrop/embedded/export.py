"""Writes images of the corpus with their questions, for other programs to train on.

    python -m pdrop.embedded.export --out build/corpus --split train --first 0 --images 20000
    python train.py train=embedded train.data=build/corpus/train.json

--format llava (default): <split>.json in LLaVA's conversation format, one record per image with its questions as turns,
and the PNGs in <split>/. --format hf: a dataset that `datasets.load_from_disk` reads, one row per image.

The same arguments write the same files. --families chooses and weights: reading=1,counting=0.5 keeps every reading
question, half of the counting questions, and no others; images without a question are left out. --turns 3 keeps at
most three questions of an image, drawn by its seed.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .questions import EmbeddedQuestion
from .samples import KINDS, MIX, SPLITS, Picture, sample
from .vocabulary import FAMILIES

log = logging.getLogger(__name__)


def asked(picture: Picture, families: Mapping[str, float] | None, turns: int | None = None) -> list[EmbeddedQuestion]:
    """The questions of a picture that are kept, in their order; which ones depends only on its seed."""
    draw = np.random.default_rng(picture.seed)
    kept = list(picture.questions)
    if families is not None:
        kept = [q for q, d in zip(kept, draw.random(len(kept))) if d < families.get(q.family, 0.0)]
    if turns is not None and len(kept) > turns:
        kept = [kept[number] for number in sorted(draw.choice(len(kept), turns, replace=False))]
    return kept


def pictures(
    split: str,
    first: int,
    images: int,
    mix: Mapping[str, float] = MIX,
    families: Mapping[str, float] | None = None,
    turns: int | None = None,
) -> Iterator[tuple[str, Picture, list[EmbeddedQuestion]]]:
    """Yield (name, picture, its questions) of images first..first+images-1 of a split; those without are left out."""
    for index in range(first, first + images):
        picture = sample(split, index, mix)
        if questions := asked(picture, families, turns):
            yield f"{split}-{index:08d}", picture, questions


def png(picture: Picture) -> bytes:
    """The image as a PNG file, fast rather than small."""
    file = io.BytesIO()
    picture.canvas.image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def record(name: str, picture: Picture, questions: list[EmbeddedQuestion], image: str) -> dict[str, Any]:
    """One record of LLaVA's format, and the family of each question."""
    turns = []
    for number, question in enumerate(questions):
        value = question.text if number else f"<image>\n{question.text}"
        turns += [{"from": "human", "value": value}, {"from": "gpt", "value": question.answer}]
    return {
        "id": name,
        "image": image,
        "kind": picture.kind,
        "families": [question.family for question in questions],
        "conversations": turns,
    }


def write_llava(out: Path, split: str, chosen: Iterator[tuple[str, Picture, list[EmbeddedQuestion]]]) -> Path:
    """<out>/<split>.json and the images in <out>/<split>/; returns the path of the JSON, which is written last."""
    (out / split).mkdir(parents=True, exist_ok=True)
    listed = []
    for name, picture, questions in chosen:
        image = f"{split}/{name}.png"
        (out / image).write_bytes(png(picture))
        listed.append(json.dumps(record(name, picture, questions, image)))
        if len(listed) % 5000 == 0:
            log.info("%d images", len(listed))
    path = out / f"{split}.json"
    path.write_text("[\n" + ",\n".join(listed) + "\n]\n", encoding="utf8")
    return path


def write_hf(out: Path, split: str, chosen: Iterator[tuple[str, Picture, list[EmbeddedQuestion]]]) -> Path:
    """A dataset in <out>/<split>: image, image_id, kind, and lists of family, question, answer, options."""
    from datasets import Dataset, Features, Image, List, Value

    text = Value("string")
    asks = {name: List(text) for name in ("families", "questions", "answers")}
    features = Features({"image_id": text, "image": Image(), "kind": text, **asks, "options": List(List(text))})

    def rows() -> Iterator[dict[str, Any]]:
        for name, picture, questions in chosen:
            yield {
                "image_id": name,
                "image": {"bytes": png(picture), "path": f"{name}.png"},
                "kind": picture.kind,
                "families": [question.family for question in questions],
                "questions": [question.text for question in questions],
                "answers": [question.answer for question in questions],
                "options": [list(question.options) for question in questions],
            }

    # from_generator would keep a copy in the user's cache, under a name that does not depend on the arguments
    Dataset.from_list(list(rows()), features=features).save_to_disk(out / split)
    return out / split


def weights(text: str, known: tuple[str, ...], what: str) -> dict[str, float]:
    """Reads "reading,counting=0.5" as {"reading": 1.0, "counting": 0.5}.

    Raises:
        ValueError: If a name is not known, or a weight is not a number of 0 or more.
    """
    found = {}
    for part in text.split(","):
        name, _, weight = part.strip().partition("=")
        if name not in known:
            raise ValueError(f"there is no {what} {name!r}; known: {', '.join(known)}")
        try:
            found[name] = float(weight or 1)
        except ValueError as error:
            raise ValueError(f"{part.strip()!r}: a weight is a number, as in {name}=0.5") from error
        if not found[name] >= 0:
            raise ValueError(f"{part.strip()!r}: a weight is 0 or more")
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--split", choices=list(SPLITS), default="train")
    parser.add_argument("--first", type=int, default=0, help="number of the first image")
    parser.add_argument("--images", type=int, required=True, help="how many images")
    parser.add_argument("--format", choices=("llava", "hf"), default="llava")
    parser.add_argument("--families", help="question families and the share of each that is kept; default: all")
    parser.add_argument("--mix", help="kinds of image and their weights, as scene=0.5,document=0.28,chart=0.22")
    parser.add_argument("--turns", type=int, help="at most this many questions per image; default: all that are kept")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        families = None if options.families is None else weights(options.families, FAMILIES, "family")
        mix = MIX if options.mix is None else weights(options.mix, KINDS, "kind of image")
        if options.turns is not None and options.turns < 1:
            raise ValueError(f"--turns {options.turns}: an image needs a question, 1 or more")
        chosen = pictures(options.split, options.first, options.images, mix, families, options.turns)
        path = (write_llava if options.format == "llava" else write_hf)(options.out, options.split, chosen)
    except ValueError as error:
        parser.error(str(error))
    log.info("written: %s", path)


if __name__ == "__main__":
    main()
