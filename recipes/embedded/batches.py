"""Tensors for the training forward: the questions of an image, packed in blocks after the image's prefix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pdrop.embedded.drawing import PATCH_HEADS
from pdrop.embedded.questions import EmbeddedQuestion
from pdrop.embedded.samples import Picture
from pdrop.embedded.tokenizer import BEGIN_ID, END_ID, PAD_ID, build_tokenizer
from pdrop.embedded.vocabulary import CHARACTERS, VISUAL_TOKENS
from recipes.embedded.forward import BLOCK
from recipes.embedded.hints import hints

_IGNORED = -100
# Asked first if there is room for some questions only: an image has few of them, and they take longest to learn.
_FIRST = ("reading", "document", "multihop")


@cache
def _tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@cache
def _words(text: str) -> tuple[int, ...]:
    return tuple(_tokenizer()(text, add_special_tokens=False).input_ids)


def _encode(text: str) -> list[int]:
    """Token ids of `text`, joined from those of its words, so that each word is tokenized only once."""
    return [token for word in text.split() for token in _words(word)]


def _hint_targets(question: EmbeddedQuestion) -> list[tuple[int, int]]:
    """Pairs of a row of the question's text and the token to predict there; see hints.py."""
    ends = list(accumulate(len(_words(word)) for word in question.text.split()))
    return [(ends[place] - 1, _words(word)[0]) for place, word in hints(question)]


def prefix_ids() -> Tensor:
    """int64 (3,): the ids before the image."""
    return torch.tensor([BEGIN_ID, *_encode("USER:")])


PREFIX = 3 + VISUAL_TOKENS


@dataclass(frozen=True)
class Span:
    """Where one question's answer is predicted: rows first..last (excluded) of a block."""

    image: int
    block: int
    first: int
    last: int
    question: EmbeddedQuestion


@dataclass(frozen=True)
class Batch:
    """Tensors of `Forward.logits`, the targets, and the spans that separate the questions."""

    pixels: Tensor  # uint8 (batch, 168, 168, 3)
    patches: Tensor  # int64 (batch, heads, VISUAL_TOKENS)
    character_targets: Tensor  # int64 (batch, VISUAL_TOKENS): the token of the code's character there, -100 without
    ids: Tensor  # int64 (batch, blocks, BLOCK)
    positions: Tensor  # int64 (batch, blocks, BLOCK)
    mask: Tensor  # bool (batch, blocks, BLOCK, BLOCK)
    targets: Tensor  # int64 (batch, blocks, BLOCK), -100 where nothing is asked
    spans: tuple[Span, ...]

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        moved = {name: value.to(device, non_blocking=True) for name, value in vars(self).items() if name != "spans"}
        return Batch(**moved, spans=self.spans)

    @property
    def rows(self) -> Tensor:
        """bool (batch, blocks, BLOCK): rows with a target."""
        return self.targets != _IGNORED


def pack(
    pictures: Sequence[Picture], blocks: int, weights: Mapping[str, float] | None = None, hinted: bool = False
) -> Batch:
    """Packs as many questions as `blocks` blocks per image hold.

    `weights` maps a family to the fraction of its questions that is asked (a family that is missing: none); None: all.
    `hinted` adds the targets of hints.py.
    """
    count = len(pictures)
    ids = np.full((count, blocks, BLOCK), PAD_ID, np.int64)
    targets = np.full((count, blocks, BLOCK), _IGNORED, np.int64)
    positions = np.full((count, blocks, BLOCK), PREFIX, np.int64)
    owner = np.zeros((count, blocks, BLOCK), np.int64)
    spans = []
    for image, picture in enumerate(pictures):
        filled = [0] * blocks
        for number, question in enumerate(_chosen(picture, weights), start=1):
            asked, answer = _encode(question.text + " ASSISTANT:"), [*_encode(question.answer), END_ID]
            length = len(asked) + len(answer)
            block = next((b for b in range(blocks) if filled[b] + length <= BLOCK), None)
            if block is None:
                continue
            start, filled[block] = filled[block], filled[block] + length
            ids[image, block, start : start + length] = asked + answer
            owner[image, block, start : start + length] = number
            positions[image, block, start : start + length] = PREFIX + np.arange(length)
            first, last = start + len(asked) - 1, start + length - 1
            targets[image, block, first:last] = answer
            for row, token in _hint_targets(question) if hinted else ():
                targets[image, block, start + row] = token
            spans.append(Span(image, block, first, last, question))
    # Padding rows (owner 0) look at each other; nobody reads them.
    mask = (owner[..., :, None] == owner[..., None, :]) & np.tril(np.ones((BLOCK, BLOCK), bool))
    patches = np.stack([picture.canvas.patch_labels() for picture in pictures]).astype(np.int64)
    return Batch(
        torch.from_numpy(np.stack([picture.canvas.pixels() for picture in pictures])),
        torch.from_numpy(patches),
        torch.from_numpy(_character_targets(patches)),
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        torch.from_numpy(mask),
        torch.from_numpy(targets),
        tuple(spans),
    )


@cache
def _character_tokens() -> np.ndarray:
    """int64 (2, characters + 1): a character's token at the start of a word and inside one; 0 is not a character."""
    ids = _tokenizer().convert_tokens_to_ids
    return np.array([[_IGNORED, *(ids(before + character) for character in CHARACTERS)] for before in ("", "##")])


def _character_targets(patches: np.ndarray) -> np.ndarray:
    """See `Batch.character_targets`. Characters without a place (a document's labels, which are words) are left out."""
    names = list(PATCH_HEADS)
    character, place = patches[:, names.index("character")], patches[:, names.index("place")]
    return np.where(place > 0, _character_tokens()[np.where(place > 1, 1, 0), character], _IGNORED)


def _chosen(picture: Picture, weights: Mapping[str, float] | None) -> list[EmbeddedQuestion]:
    """The questions to ask, in order of preference; which ones depends only on the picture's seed."""
    if weights is not None:
        draw = np.random.default_rng(picture.seed).random(len(picture.questions))
        kept = [q for q, d in zip(picture.questions, draw) if d < weights.get(q.family, 0.0)]
    else:
        kept = list(picture.questions)
    return sorted(kept, key=lambda question: question.family not in _FIRST)
