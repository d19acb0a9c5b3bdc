"""Batches from rows: padding, and which records go together."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor

from pdrop.training.encode import PER_TOKEN, Encoder, Row, stack


class Collator:
    """Pads rows on the right and stacks the vision tower's inputs.

    If several processes train together, every batch must have an image: a process that calls the tower while another
    does not would wait for ever (FSDP, ZeRO-3), or miss gradients (DDP). A text-only batch then gets a black image
    after its shortest row, as padding: nothing attends to it, no method sees it as visual tokens, and the loss does not
    change. LLaVA's code has a dummy image for the same reason.

    Args:
        encoder: Makes the black image.
        pad_id: Token id of padding.
        always_image: Whether text-only batches get a black image.
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
    """All records once per epoch: records with images and text-only records in separate batches of similar lengths, the
    batches in random order (LLaVA's group_by_modality_length).

    Args:
        lengths: Length of each record, negative for text only.
        batch: Records of a step, over all processes and accumulated batches.
        seed: Seed of the order.
        epoch: Returns the number of the epoch that begins, so that a resumed training continues in its order.
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
        """Group into steps of one modality; the remainders make the last, mixed steps."""
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
        # longest first within a step, so that each of several processes gets rows of similar lengths
        left.sort(key=lambda index: -abs(self.lengths[index]))
        return [index for step in whole for index in step] + left
