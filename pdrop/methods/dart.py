"""DART: keep the tokens least like a few pivots (arXiv 2502.11494, "Stop Looking for Important Tokens in Multimodal
Language Models: Duplication Matters More"; its code as ZichenWen1/DART published it, read in Chenfei-Liao/VTC-Bench at
983e443).

Pivots have the longest keys (L1, with their rotary positions) in the layer before the boundary: some visual
tokens, and some text tokens after the last picture, which only choose. Each in turn takes equally many of the visual
tokens that are left: those least like it, by the cosine of the boundary's input after the decoder's LAST
normalisation. The visual pivots stay as well. So for a number b, 4 + 8 * (b // 8) stay: 196, 132 and 68 for the
counts 192, 128 and 64 of the published scripts, and 188, 124 and 60 of 576 for their ratios 0.667, 0.778 and
0.889.

The pivots' order is that of the published code, which iterates over a Python set of their places in the prompt: it
decides up to eight of 196 tokens, and the same picture seven places further on keeps other tokens.

Where this differs from the published code:
- all pictures of a prompt are one set; that code knows one picture, and treats a second one as text;
- if there are fewer pivots than asked for, each takes more; that code raises without four text tokens after the
  picture;
- batches and padding; that code asserts a batch of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pdrop.methods.base import Method, View
from pdrop.methods.transfer import read_back
from pdrop.schedule import Schedule, Stage, single
from pdrop.shapes import ModelSizes, PromptSize

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DART(Method):
    """Visual tokens least like the pivots, and the visual pivots.

    Attributes:
        image_pivots: Number of visual pivots.
        text_pivots: Number of text pivots.
    """

    image_pivots: int = 4
    text_pivots: int = 4
    observe: ClassVar[int] = -1
    ranks_by_attention: ClassVar[bool] = False
    one_boundary: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("image_pivots", "text_pivots"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} is a number of tokens from 0 on, not {value!r}")
        if not self.image_pivots + self.text_pivots:
            raise ValueError("DART needs a pivot: image_pivots or text_pivots from 1 on")

    def count(self, stage: Stage, visual: int) -> int:
        """The visual pivots, and equally many tokens per pivot up to the stage's number; everything at keep 1."""
        if stage.keep == 1:
            return visual
        pivots = self.image_pivots + self.text_pivots
        each = min(super().count(stage, visual), max(0, visual - self.image_pivots)) // pivots
        return min(visual, self.image_pivots + pivots * each)

    def score(self, view: View) -> Tensor:
        """2 for visual pivots, between 1 and 2 for tokens that were taken, more for earlier turns; 0 for others. [B,
        T]."""
        import torch

        assert view.output is not None and view.stays is not None
        longest = view.keys().abs().float().sum((1, 3))  # [B, T]
        scores, words = torch.zeros_like(longest), view.question()
        places = view.valid.cumsum(1) - 1  # in the prompt without its padding
        ranked = longest.masked_fill(~words, -torch.inf).argsort(dim=1, descending=True, stable=True)
        found = []
        for row, (stays, pinned, _) in enumerate(zip(view.stays, view.pinned, view.visual_counts)):
            image = view.visual_places(row)
            own = image[longest[row, image].argsort(descending=True, stable=True)[: self.image_pivots]]
            own = own[: max(0, stays - pinned)]
            found.append((image, own, torch.cat([own, ranked[row, : self.text_pivots]])))
        asks, *named = read_back([words.sum(1), *(places[row, both] for row, (_, _, both) in enumerate(found))])
        for row, (stays, pinned, now) in enumerate(zip(view.stays, view.pinned, view.visual_counts)):
            if stays >= now:
                continue
            image, own, pivots = found[row]
            pivots = pivots[: len(own) + int(asks[row])]  # a question may have fewer words than pivots are asked for
            states = view.final_norm(view.output[row, torch.cat([image, pivots])])
            states = torch.nn.functional.normalize(states.float(), dim=-1, eps=1e-8).to(scores.device)
            chosen = torch.isin(image, own)
            like = (states[: len(image)] @ states[len(image) :].T).detach()  # [visual, pivots]
            like, turns = like.masked_fill(chosen[:, None], torch.inf), 2.0 * chosen
            numbers = {place: number for number, place in enumerate(named[row][: len(pivots)].tolist())}
            wanted = stays - pinned - len(own)
            each = -(-wanted // max(1, len(pivots)))
            # a set made from a list: made from anything else it can have another order
            for turn, place in enumerate(set(list(numbers))):
                take = min(each, wanted)
                mine = like[:, numbers[place]].argsort(stable=True)[:take]
                like.index_fill_(0, mine, torch.inf)
                turns.index_fill_(0, mine, 1.0 + 0.5 / (1 + turn))
                wanted -= take
            scores[row, image] = turns
        return scores

    def extra_macs(self, schedule: Schedule, prompt: PromptSize, sizes: ModelSizes) -> float:
        """Cosines of the visual tokens to the pivots."""
        (layer,) = schedule.layers
        before, after = (prompt.visual, *prompt.visual_per_layer)[layer : layer + 2]
        if after >= before:
            return 0.0
        pivots = min(self.image_pivots, before) + min(self.text_pivots, prompt.text)
        return before * sizes.hidden * pivots

    def dial(self, ratio: float, num_layers: int, layers: Sequence[int] | None = None) -> Schedule:
        """One boundary before layer 2."""
        return single(2, ratio, num_layers, layers)
