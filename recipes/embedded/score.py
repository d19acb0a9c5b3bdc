"""Scores a model folder on the test split with transformers' own generate, and prints the best blind guess next to it.

    python -m recipes.embedded.score [--model FOLDER] [--limit 100] [--blind]

--blind hides every visual token from attention: the score is then what the questions alone give away. This command is
for use while training; results for publication come from run.py, which scores with lmms-eval.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pdrop.command_help import CommandHelp
from pdrop.embedded.corpus import FLOORS_FILE, TEST_FILE
from pdrop.embedded.corpus import FOLDER as DATA
from pdrop.embedded.model import FOLDER as MODEL
from pdrop.embedded.tokenizer import IMAGE
from pdrop.embedded.vocabulary import FAMILIES

_LONGEST = 8  # tokens of an answer


def read_test(limit: int | None = None) -> list[dict[str, Any]]:
    """The rows of the test split, images as PNG bytes; the first `limit` of each family."""
    import pyarrow.parquet as pq

    rows = pq.read_table(DATA / TEST_FILE).to_pylist()
    counts: Counter[str] = Counter()
    kept = []
    for row in rows:
        counts[row["family"]] += 1
        if limit is None or counts[row["family"]] <= limit:
            kept.append(row)
    return kept


class Scorer:
    """A loaded model folder that answers questions."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        self.model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
        self.processor.tokenizer.padding_side = "left"
        self.image_id = self.processor.tokenizer.convert_tokens_to_ids(IMAGE)

    @torch.no_grad()
    def answer(self, rows: list[dict[str, Any]], blind: bool = False) -> list[str]:
        """Greedy answers to a batch of rows."""
        prompts = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}],
                add_generation_prompt=True,
            )
            for row in rows
        ]
        images = [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]
        inputs = self.processor(images=images, text=prompts, return_tensors="pt", padding=True)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        if blind:
            # The tokens keep their places and the question its positions, but nothing may attend to the tokens.
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            inputs["attention_mask"] = inputs["attention_mask"] * (inputs["input_ids"] != self.image_id)
        written = self.model.generate(**inputs, max_new_tokens=_LONGEST, do_sample=False)
        new = written[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]


def score(folder: Path, limit: int | None = None, blind: bool = False, batch: int = 16) -> dict[str, float]:
    """Exact match per family, 0 to 1."""
    scorer, rows = Scorer(folder), read_test(limit)
    hits: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        for row, said in zip(some, scorer.answer(some, blind)):
            asked[row["family"]] += 1
            hits[row["family"]] += said == row["answer"]
    return {family: hits[family] / asked[family] for family in FAMILIES if asked[family]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=CommandHelp)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--limit", type=int, help="questions per family; all if not given")
    parser.add_argument("--blind", action="store_true", help="hide the image")
    options = parser.parse_args(arguments)
    if not (options.model / "config.json").is_file():
        parser.error(f"--model {options.model}: no config.json there; give the folder of a saved model")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    floors = json.loads((DATA / FLOORS_FILE).read_text())["families"]
    for family, value in score(options.model, options.limit, options.blind).items():
        logging.info("%-10s %5.1f   blind guess %5.1f", family, 100 * value, 100 * floors[family]["floor"])


if __name__ == "__main__":
    main()
