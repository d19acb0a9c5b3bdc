"""Rows -> batches: padding, and which records go together."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor

from pdrop.training.encode import PER_TOKEN, Encoder, Row, stack


class Collator:
    """Pads rows on the right and stacks what goes into the vision tower.

    Where several processes train together, every batch must bring an image: one process that calls the tower while
    another does not would wait for it for ever (FSDP, ZeRO-3), or lack its gradients (DDP). A batch of text alone then
    carries a black image after its shortest row, as padding: nothing attends to it, it is not a visual token to any
    method, and the loss is what it was. LLaVA's code has a dummy image for the same reason.

    Args:
        encoder: Makes the black image.
        pad_id: Token id of padding.
        always_image: Whether batches of text alone get one.
    """

    def __init__(self, encoder: Encoder, pad_id: int, always_image: bool = False) -> None:
        self.fill = PER_TOKEN | {"input_ids": pad_id}
        self.black = encoder.see(Image.new("RGB", (64, 64))) if always_image else None

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """input_ids, attention_mask, labels [B, n], and pixels as the model takes them."""
        rows = [dict(row) for row in rows]
        if self.black is not None and not any(set(row) - set(PER_TOKEN) for row in rows):
            shortest = min(rows, key=lambda row: len(row["input_ids"]))
            ids = self.black["input_ids"][0]
            shortest["attention_mask"] = torch.cat([shortest["attention_mask"], torch.zeros_like(ids)])
            shortest["labels"] = torch.cat([shortest["labels"], torch.full_like(ids, self.fill["labels"])])
            shortest["input_ids"] = torch.cat([shortest["input_ids"], ids])
            if "mm_token_type_ids" in self.black:  # without them Qwen's models refuse an image; zeros mark none
                shortest["mm_token_type_ids"] = torch.zeros_like(shortest["input_ids"])
            shortest |= {key: value for key, value in self.black.items() if key not in PER_TOKEN}
        batch, longest = {}, max(len(row["input_ids"]) for row in rows)
        for key in {key for row in rows for key in row}:
            if key not in PER_TOKEN:
                batch[key] = stack([row[key] for row in rows if key in row])
                continue
            batch[key] = torch.full((len(rows), longest), self.fill[key])
            for at, row in enumerate(rows):
                if key in row:
                    batch[key][at, : len(row[key])] = row[key]
                elif key != "mm_token_type_ids":
                    raise KeyError(f"a row lacks {key}")
        return batch


class ByModality(torch.utils.data.Sampler[int]):
    """Every epoch, all records once: those with images and those of text alone in batches of their own, like lengths
    together, the batches in random order (LLaVA's group_by_modality_length).

    Args:
        lengths: Of each record; negative for those of text alone.
        batch: Records of a step, over all processes and accumulated batches.
        seed: Of the order.
        epoch: Tells the number of the epoch that begins, so that a resumed training goes on in its order.
        grouped: False: any order, modalities and lengths mixed.
    """

    def __init__(
        self, lengths: Sequence[int], batch: int, seed: int, epoch: Callable[[], int], grouped: bool = True
    ) -> None:
        self.lengths, self.batch, self.seed, self.epoch, self.grouped = lengths, batch, seed, epoch, grouped

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed} {self.epoch()}")
        everything = list(range(len(self.lengths)))
        rng.shuffle(everything)
        return iter(self._group(everything, rng) if self.grouped else everything)

    def _group(self, order: list[int], rng: random.Random) -> list[int]:
        """In steps of one modality; what is left over of each makes the last, mixed ones."""
        whole, left = [], []
        for text in (False, True):
            one = [index for index in order if (self.lengths[index] < 0) == text]
            full = len(one) // self.batch * self.batch
            left += one[full:]
            # sorted by length within stretches of 50 steps only, so that the order stays random
            stretch = 50 * self.batch
            for start in range(0, full, stretch):
                near = sorted(one[start : min(start + stretch, full)], key=lambda index: -abs(self.lengths[index]))
                whole += [near[at : at + self.batch] for at in range(0, len(near), self.batch)]
        rng.shuffle(whole)
        # longest in front within a step: of several processes each gets rows of like lengths
        left.sort(key=lambda index: -abs(self.lengths[index]))
        return [index for step in whole for index in step] + left
