"""Writes the test split as one parquet file, and next to it the score of the best blind guess.

    python -m pdrop.embedded.corpus [--out pdrop/embedded/data]

The same versions of Pillow and pyarrow write the same bytes. A row holds its image as PNG; rows about the same image
share its bytes in the file (dictionary encoding), so 2500 rows take about as much space as their 700 images.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .questions import EmbeddedQuestion, named, template
from .samples import Picture, sample
from .vocabulary import FAMILIES

FOLDER = Path(__file__).parent / "data"
TEST_FILE, FLOORS_FILE = "test.parquet", "floors.json"
QUESTIONS_PER_FAMILY = 250
_PER_IMAGE = 2  # questions of one family about one image, at most
GUESS_IMAGES = 20_000  # train images that the blind guess learns from


def asked_of_test(per_family: int = QUESTIONS_PER_FAMILY) -> Iterator[tuple[int, Picture, EmbeddedQuestion]]:
    """Yield (index of the image, picture, question) of the test split until every family has `per_family` questions."""
    missing = dict.fromkeys(FAMILIES, per_family)
    index = 0
    while any(missing.values()):
        picture = sample("test", index)
        taken: Counter[str] = Counter()
        for question in picture.questions:
            if missing[question.family] and taken[question.family] < _PER_IMAGE:
                missing[question.family] -= 1
                taken[question.family] += 1
                yield index, picture, question
        index += 1


def png(picture: Picture) -> bytes:
    """The image as a PNG file."""
    file = io.BytesIO()
    picture.canvas.image.save(file, "PNG", optimize=True)
    return file.getvalue()


def rows(per_family: int = QUESTIONS_PER_FAMILY) -> list[dict[str, Any]]:
    """Rows of the parquet file, family by family."""
    images: dict[int, bytes] = {}
    by_family: dict[str, list[dict[str, Any]]] = {family: [] for family in FAMILIES}
    for index, picture, question in asked_of_test(per_family):
        if index not in images:
            images[index] = png(picture)
        found = by_family[question.family]
        found.append(
            {
                "question_id": f"{question.family}-{len(found):04d}",
                "image_id": f"test-{index:05d}",
                "image": {"bytes": images[index], "path": f"test-{index:05d}.png"},
                "family": question.family,
                "question": question.text,
                "answer": question.answer,
                "options": list(question.options),
            }
        )
    return [row for family in FAMILIES for row in by_family[family]]


def write_parquet(listed: list[dict[str, Any]], path: Path) -> None:
    """One row group, with the schema by which `datasets` decodes the image to a PIL image."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features, Image, List, Value

    text = Value("string")
    features = Features(
        {
            "question_id": text,
            "image_id": text,
            "image": Image(),
            "family": text,
            "question": text,
            "answer": text,
            "options": List(text),
        }
    )
    table = pa.Table.from_pylist(listed, schema=features.arrow_schema)
    pq.write_table(table, path, row_group_size=len(listed), compression="zstd", dictionary_pagesize_limit=1 << 26)


def blind_rule(images: int = GUESS_IMAGES) -> dict[str, dict[str, str]]:
    """family -> template -> the guess that is right most often in the first `images` train images.

    A guess is an answer, or a slot such as "<shape>", which repeats the name that the question has there. Ties: the
    first by name.
    """
    counts: dict[str, dict[str, Counter[str]]] = {family: defaultdict(Counter) for family in FAMILIES}
    for index in range(images):
        for question in sample("train", index).questions:
            right = counts[question.family][template(question.text)]
            right[question.answer] += 1
            right.update(slot for slot, name in named(question.text).items() if name == question.answer)
    return {
        family: {
            stem: min(answers, key=lambda answer: (-answers[answer], answer))
            for stem, answers in sorted(by_template.items())
        }
        for family, by_template in counts.items()
    }


def guess(rule: Mapping[str, str], question: str) -> str | None:
    """A family's guess at a question; None if no train question has its template."""
    answer = rule.get(template(question))
    return None if answer is None else named(question).get(answer, answer)


def floors(listed: list[dict[str, Any]], rule: Mapping[str, Mapping[str, str]], images: int) -> dict[str, Any]:
    """Per family: how many test questions, how many of them the rule answers (a fraction), and the rule."""
    result: dict[str, Any] = {}
    for family in FAMILIES:
        asked = [row for row in listed if row["family"] == family]
        hits = sum(guess(rule[family], row["question"]) == row["answer"] for row in asked)
        result[family] = {"n": len(asked), "floor": hits / len(asked), "rule": rule[family]}
    return {
        "what": "accuracy on the test split of the best guess without the image: for each question template its most "
        "frequent train answer, or the name in a slot of the question repeated, whichever is right more often in train",
        "train_images": images,
        "families": result,
    }


def write(out: Path, per_family: int = QUESTIONS_PER_FAMILY, images: int = GUESS_IMAGES) -> None:
    """Writes both files to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    listed = rows(per_family)
    write_parquet(listed, out / TEST_FILE)
    text = json.dumps(floors(listed, blind_rule(images), images), indent=1)
    (out / FLOORS_FILE).write_text(text + "\n")
    logging.getLogger(__name__).info("%d questions written to %s", len(listed), out)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    write(parser.parse_args(arguments).out)


if __name__ == "__main__":
    main()
