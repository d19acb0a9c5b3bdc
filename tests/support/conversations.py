"""A small training set in LLaVA's format: pictures of several shapes, records of every kind that occurs in theirs.

path = write_conversations(tmp_path)      # tmp_path/train.json and tmp_path/pictures/
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from PIL import Image

SIDES = [(28, 28), (56, 28), (30, 70), (64, 64), (90, 40)]


def picture(path: Path, side: tuple[int, int], seed: int) -> str:
    """A noise picture; returns its name."""
    rng = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("RGB", side, rng.randbytes(3 * side[0] * side[1])).save(path)
    return path.name


def said(*turns: str) -> list[dict[str, str]]:
    """Turns of human and gpt, by turns."""
    return [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(turns)]


def records(folder: Path, images: int = 6) -> list[dict[str, Any]]:
    """One image and one turn; one image and two turns; two images; text alone; an end without an answer."""
    names = [picture(folder / f"{n}.png", SIDES[n % len(SIDES)], n) for n in range(images)]
    listed: list[dict[str, Any]] = []
    for n, name in enumerate(names):
        turns = said("<image>\nWhat is it?", "ab" * (n % 3 + 1), "Sure?", "yes")[: 2 + 2 * (n % 2)]
        listed.append({"id": f"i{n}", "image": name, "conversations": turns})
    listed.append({"id": "two", "image": names[:2], "conversations": said("<image> or <image>?", "both")})
    listed.append({"id": "open", "image": names[0], "conversations": said("What?\n<image>", "it", "And then?")})
    for n in range(3):
        listed.append({"id": f"t{n}", "conversations": said("Say " + "m" * (n + 1), "m" * (n + 1))})
    return listed


def write_conversations(folder: Path, listed: list[dict[str, Any]] | None = None, name: str = "train.json") -> Path:
    """Write them; returns the path of the JSON. Images are in pictures/ beside it."""
    listed = records(folder / "pictures") if listed is None else listed
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(listed))
    return path


def captions(folder: Path, images: int = 4) -> list[dict[str, Any]]:
    """Pre-training pairs: an image, an instruction that the plain format leaves out, a caption."""
    return [
        {"id": n, "image": record["image"], "conversations": said("Describe.\n<image>", f"caption {n}")}
        for n, record in enumerate(records(folder / "pictures", images)[:images])
    ]
