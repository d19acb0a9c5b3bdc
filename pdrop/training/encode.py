"""Encodes a conversation as a row of the batch: token ids, labels on the answers only, pixels.

Formats:
    vicuna_v1   LLaVA's v1 template: system sentence, "USER: ... ASSISTANT:", labels on " answer</s>" of every turn
    plain       LLaVA's pre-training: the image and its caption, no instruction; labels on the caption and its newline
    chat        the checkpoint's own chat template, labels from where an answer begins to its end token

The query token, which precedes each answer, is thus the final ":" of "ASSISTANT:" in vicuna_v1, as in inference, and
the image's last token in `plain`. There the official code uses the last token that is still kept; here the query itself
always stays (its logits are needed) and counts as kept.

A row longer than `max_length` is cut at its end, as LLaVA does, but never inside an image: such a record is refused, or
with overlong=skip it has no labels and a warning is logged.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from pdrop.evaluation.prompts import PLACEHOLDER, VICUNA_V1_SYSTEM, PromptBuilder
from pdrop.pictures import as_shown, opened
from pdrop.record import ImageMode, check_word
from pdrop.training.conversations import Conversations, Record
from pdrop.training.record import Format, Overlong

log = logging.getLogger(__name__)

Row = dict[str, Tensor]
IGNORED = -100
PER_TOKEN = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED, "mm_token_type_ids": 0}  # and how they are padded


class Encoder:
    """Turns records into rows for one checkpoint.

    Args:
        processor: The checkpoint's transformers processor, with a fast tokenizer.
        format: One of the formats above.
        image_mode: "crop" or "pad": see pdrop/evaluation/prompts.py.
        max_length: Most tokens of a row.
        overlong: "stop" or "skip": what happens to a record whose images do not fit.

    Raises:
        ValueError: If the checkpoint lacks what the format needs.
    """

    def __init__(
        self,
        processor: Any,
        format: Format = "chat",
        image_mode: ImageMode = "crop",
        max_length: int = 2048,
        overlong: Overlong = "stop",
    ) -> None:
        check_word("format", format, get_args(Format))
        check_word("overlong", overlong, get_args(Overlong))
        if not getattr(processor.tokenizer, "is_fast", False):
            raise ValueError("training needs a fast tokenizer (tokenizer.json), which says where each token comes from")
        self.builder = PromptBuilder(processor, "chat" if format == "chat" else "vicuna_v1", image_mode)
        self.processor, self.tokenizer, self.format = processor, processor.tokenizer, format
        self.max_length, self.overlong = max_length, overlong
        self.mark = processor.image_token
        self.mark_id = self.tokenizer.convert_tokens_to_ids(self.mark)

    def __call__(self, record: Record) -> Row:
        """The row of a record: input_ids, attention_mask, labels [n], and the vision tower's inputs.

        Raises:
            ValueError: If an image cannot be read or does not fit; names the record.
        """
        text, spans = self.render(record)
        spelled_out = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
        encoded = self.tokenizer(text, add_special_tokens=not spelled_out, return_offsets_mapping=True, verbose=False)
        ids, labels = encoded["input_ids"], self._labels(encoded["input_ids"], encoded["offset_mapping"], spans)
        if ids.count(self.mark_id) != len(record.images):
            raise ValueError(
                f"{record.name}: its text spells out {self.mark}, the model's image token; take it out of the text"
            )
        shown = [self.see(self._open(path, record)) for path in record.images]
        row = self._assemble(torch.tensor(ids), torch.tensor(labels), shown)
        return self._shorten(row, record) if len(row["input_ids"]) > self.max_length else row

    def check(self, records: Conversations) -> None:
        """Check all records before the first step, if that is cheap (in the plain format).

        Raises:
            ValueError: If a record does not suit the format; names the first.
        """
        if self.format == "plain":
            for index in range(len(records)):
                self.render(records[index])

    # ---------------------------------------------------------------- text

    def render(self, record: Record) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and the spans of its answers in it, as (first, one past the last) characters.

        Raises:
            ValueError: If the record does not suit the format.
        """
        return {"vicuna_v1": self._vicuna, "plain": self._plain, "chat": self._chat}[self.format](record)

    def _vicuna(self, record: Record) -> tuple[str, list[tuple[int, int]]]:
        text = f"{VICUNA_V1_SYSTEM} "
        spans: list[tuple[int, int]] = []
        for turn in record.turns:
            text += f"USER: {turn.question.replace(PLACEHOLDER, self.mark)} ASSISTANT:"
            if turn.answer is not None:
                spans.append((len(text), len(text) + len(turn.answer) + 1 + len(self.tokenizer.eos_token)))
                text += f" {turn.answer}{self.tokenizer.eos_token}"
        return text, spans

    def _plain(self, record: Record) -> tuple[str, list[tuple[int, int]]]:
        if len(record.turns) != 1 or len(record.images) != 1 or record.turns[0].answer is None:
            raise ValueError(
                f"{record.name}: the plain format is for one image and one caption; choose train.format=vicuna_v1 or chat"
            )
        text = f"{self.mark}{record.turns[0].answer}\n"
        return text, [(len(self.mark), len(text))]

    def _chat(self, record: Record) -> tuple[str, list[tuple[int, int]]]:
        messages: list[dict[str, Any]] = []
        spans: list[tuple[int, int]] = []
        text = ""
        for turn in record.turns:
            messages.append({"role": "user", "content": _content(turn.question)})
            if turn.answer is None:
                return self._template(messages, asks=True), spans
            asked = self._template(messages, asks=True)
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
            before, text = text, self._template(messages)
            if not (text.startswith(asked) and asked.startswith(before)):
                raise ValueError(
                    f"{record.name}: this checkpoint's chat template rewrites earlier turns, so answers cannot be told "
                    "from the rest; choose train.format=vicuna_v1, or keep to one turn per record"
                )
            end, eos = len(text), self.tokenizer.eos_token
            if eos and (at := text.find(eos, len(asked))) >= 0:
                end = at + len(eos)  # a newline that a template adds is not part of the answer
            spans.append((len(asked), end))
        return text, spans

    def _template(self, messages: list[dict[str, Any]], asks: bool = False) -> str:
        return str(self.processor.apply_chat_template(messages, add_generation_prompt=asks, tokenize=False))

    @staticmethod
    def _labels(ids: list[int], offsets: list[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
        """The ids of the answers' tokens, IGNORED elsewhere; a token that overlaps an answer's start belongs to it."""
        labels, at = [IGNORED] * len(ids), 0
        for first, end in spans:
            while at < len(ids) and offsets[at][1] <= first:
                at += 1
            while at < len(ids) and offsets[at][0] < end:
                labels[at] = ids[at]
                at += 1
        return labels

    # ---------------------------------------------------------------- images

    def see(self, image: Image.Image) -> dict[str, Tensor]:
        """One image's inputs: its placeholder ids [1, v], and the tower's inputs."""
        return dict(
            self.processor(
                text=[self.mark], images=[self.builder.prepare(image)], add_special_tokens=False, return_tensors="pt"
            )
        )

    @staticmethod
    def _open(path: Path, record: Record) -> Image.Image:
        try:
            with opened(path) as image:
                return as_shown(image)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"{record.name}: {path} cannot be read as an image ({error}); mend or replace it"
            ) from error

    def _assemble(self, ids: Tensor, labels: Tensor, shown: Sequence[dict[str, Tensor]]) -> Row:
        """Each image's ids in place of its mark."""
        kinds = [key for key in PER_TOKEN if any(key in one for one in shown)]
        pieces: dict[str, list[Tensor]] = {key: [] for key in {"input_ids", "labels", *kinds} - {"attention_mask"}}
        first = 0
        for at, one in zip((ids == self.mark_id).nonzero()[:, 0].tolist(), shown):
            width = one["input_ids"].shape[1]
            for key, parts in pieces.items():
                front = {"input_ids": ids, "labels": labels}.get(key, torch.zeros_like(ids))[first:at]
                parts += [front, one[key][0] if key in one else torch.full((width,), IGNORED)]
            first = at + 1
        for key, parts in pieces.items():
            parts.append({"input_ids": ids, "labels": labels}.get(key, torch.zeros_like(ids))[first:])
        row = {key: torch.cat(parts) for key, parts in pieces.items()}
        row["attention_mask"] = torch.ones_like(row["input_ids"])
        for key in {key for one in shown for key in one} - set(PER_TOKEN):
            row[key] = stack([one[key] for one in shown])
        return row

    def _shorten(self, row: Row, record: Record) -> Row:
        """Cut a row at its end; if that would cut an image, refuse it or remove all labels."""
        visual = (row["input_ids"] == self.mark_id).nonzero()[:, 0]
        needed = int(visual[-1]) + 1 if len(visual) else 0
        if needed > self.max_length:
            said = f"{record.name}: its images end at token {needed}, max_length is {self.max_length}"
            if self.overlong == "stop":
                raise ValueError(f"{said}; raise train.max_length, leave the record out, or set train.overlong=skip")
            log.warning("%s: skipped", said)
            kept = row["input_ids"][row["input_ids"] != self.mark_id][: self.max_length]
            return {"input_ids": kept, "attention_mask": kept * 0 + 1, "labels": torch.full_like(kept, IGNORED)}
        cut = {key: value[: self.max_length] if key in PER_TOKEN else value for key, value in row.items()}
        if not (cut["labels"] != IGNORED).any():
            log.warning("%s: nothing of its answers fits into %d tokens", record.name, self.max_length)
        return cut


class Rows(torch.utils.data.Dataset[Row]):
    """Records as rows, each made on access."""

    def __init__(self, records: Conversations, encoder: Encoder) -> None:
        self.records, self.encoder = records, encoder

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Row:
        return self.encoder(self.records[index])


def _content(question: str) -> list[dict[str, str]]:
    """A question as the parts of a chat message, images where they are marked."""
    content: list[dict[str, str]] = []
    for number, piece in enumerate(question.split(PLACEHOLDER)):
        content += [{"type": "image"}] if number else []
        piece = piece.removeprefix("\n") if number else piece  # templates put their own newline after an image
        content += [{"type": "text", "text": piece}] if piece else []
    return content


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate along the first dimension, the others padded with zeros (LLaVA-NeXT's tiles differ in number)."""
    widest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors))]
    filled = []
    for tensor in tensors:
        missing = [size for most, now in zip(widest, tensor.shape[1:]) for size in (most - now, 0)]
        filled.append(pad(tensor, missing[::-1]) if any(missing) else tensor)
    return torch.cat(filled)
