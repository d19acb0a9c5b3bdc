"""One prefill: what a forward that brought prompts did, as lists that can be printed.

Tensors stay on their device until they are read, so recording them costs a forward nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pdrop.engine.sequence import Alive
from pdrop.engine.study import LayerAttention, Noted, rows_of
from pdrop.methods.transfer import read_back

SHOWN = 3  # prompts that are printed


@dataclass
class Ranked:
    """One boundary of one prefill."""

    scores: Tensor  # [B, T] float32, of the tokens before it
    before: Alive
    after: Alive
    names: Tensor | None  # [B, T] names before it (see Alive.names), if anything was merged here or earlier
    centres: Tensor | None = None  # [B, M] and
    weights: Tensor | None = None  # [B, M, T]: see pdrop.methods.base.Merged
    moved: bool = False

    @property
    def made(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Names, centres and weights of the tokens made at this boundary; None if none were."""
        if self.names is None or self.centres is None or self.weights is None:
            return None
        return self.names, self.centres, self.weights


@dataclass(frozen=True)
class MergedToken:
    """A token that was merged from others at a boundary.

    Attributes:
        number: Index of the merged token in its prompt, from 0.
        centre: The visual token whose place it took.
        sources: What it was made of: {visual token: weight}.
        moved: Whether it is a single original token at another place.

    Visual tokens are numbered as in `Trace.order`: original ones by their index, merged token m by -1 - m.
    """

    number: int
    centre: int
    sources: dict[int, float]
    moved: bool = False


@dataclass(repr=False)
class Prefill:
    """What one forward did with the prompts it brought, written while it runs; `Trace` describes its attributes.

    Attributes:
        visual: Visual tokens of each prompt, a list over the batch.
        numbers: Running number of each visual token of its prompt, [B, L] on the host.
        ranked: One entry per boundary that was passed.
    """

    num_layers: int
    num_boundaries: int
    visual: list[int] = field(default_factory=list)
    numbers: Tensor | None = None
    ranked: list[Ranked] = field(default_factory=list)
    noted: list[Noted] = field(default_factory=list)
    lengths: dict[int, list[int]] = field(default_factory=dict)  # from this layer on, per row
    visual_lengths: dict[int, list[int]] = field(default_factory=dict)

    def __repr__(self) -> str:
        """A line for each of the first prompts: the number of tokens at each layer where it changes."""
        lines = []
        for row, visual in enumerate(self.visual[:SHOWN]):
            changes = sorted(layer for layer in self.lengths if row < len(self.lengths[layer]))
            steps = ", ".join(
                f"layer {layer}: {self.lengths[layer][row]} tokens, {self.visual_lengths[layer][row]} visual"
                for layer in changes
            )
            made = [after.made[row] for after in (ranked.after for ranked in self.ranked) if after.made]
            merged = f", {made[-1]} of them merged" if made and made[-1] else ""
            lines.append(f"  prompt {row}, {visual} visual tokens; from {steps}{merged}")
        if (more := len(self.visual) - SHOWN) > 0:
            lines.append(f"  and {more} more prompts")
        return "\n".join(lines) or "  no prompt"

    def start(self, visual: list[int], lengths: list[int], numbers: Tensor) -> None:
        self.visual, self.numbers = list(visual), numbers
        self.lengths, self.visual_lengths = {0: list(lengths)}, {0: list(visual)}

    def boundary(self, layer: int, lengths: list[int], visual: list[int], ranked: Ranked) -> None:
        """Record a boundary: from `layer` on each row has that many tokens."""
        self.lengths[layer], self.visual_lengths[layer] = list(lengths), list(visual)
        self.ranked.append(ranked)

    @property
    def attention(self) -> list[list[LayerAttention]]:
        """Per prompt, per layer: what its query tokens attend to. Layer 0 and the boundaries' layers."""
        layers = rows_of(self.noted)
        return [[layer[row] for layer in layers] for row in range(len(self.visual))]

    @property
    def kept(self) -> list[list[Tensor]]:
        """Per boundary, per prompt: ORIGINAL visual indices that stay, ascending LongTensor on the CPU.

        A made token that is a moved original token counts as that token.
        """
        moved: list[dict[int, int]] = [{} for _ in self.visual]
        boundaries = []
        for order, merged in zip(self.order, self.merged):
            for own, made in zip(moved, merged):
                copies = {-1 - token.number: next(iter(token.sources)) for token in made if token.moved}
                own |= {name: own.get(source, source) for name, source in copies.items()}
            named = [[own.get(name, name) for name in row.tolist()] for own, row in zip(moved, order)]
            boundaries.append([torch.tensor(sorted(n for n in row if n >= 0), dtype=torch.long) for row in named])
        return boundaries

    @property
    def order(self) -> list[list[Tensor]]:
        """Per boundary, per prompt: all visual tokens after it in their order, LongTensor on the CPU."""
        left = [ranked.after for ranked in self.ranked]
        boundaries: list[list[Tensor]] = []
        read = read_back(
            [*(one.index if one.names is None else one.names for one in left), *(one.visual for one in left)]
        )
        for one, named, mask in zip(left, read, read[len(left) :]):
            assert self.numbers is not None
            named = self.numbers.gather(1, named) if one.names is None else named
            boundaries.append([row[chosen] for row, chosen in zip(named, mask)])
        return boundaries or [[torch.arange(n) for n in self.visual] for _ in range(self.num_boundaries)]

    @property
    def merged(self) -> list[list[list[MergedToken]]]:
        """Per boundary, per prompt: the tokens that were made there, in their order. Empty where nothing merges."""
        read = iter(read_back(x for ranked in self.ranked for x in ranked.made or ()))
        boundaries: list[list[list[MergedToken]]] = [
            self._made(ranked, next(read), next(read), next(read)) if ranked.made else [[] for _ in self.visual]
            for ranked in self.ranked
        ]
        return boundaries or [[[] for _ in self.visual] for _ in range(self.num_boundaries)]

    @staticmethod
    def _made(ranked: Ranked, names: Tensor, centres: Tensor, weights: Tensor) -> list[list[MergedToken]]:
        rows = []
        for row, (named, own) in enumerate(zip(names.tolist(), centres.tolist())):
            first = ranked.before.made[row] if ranked.before.made else 0
            made: list[MergedToken] = []
            for at, number in enumerate(range(first, ranked.after.made[row])):
                sources = {name: weight for name, weight in zip(named, weights[row, at].tolist()) if weight}
                made.append(MergedToken(number, named[own[at]], sources, ranked.moved and len(sources) == 1))
            rows.append(made)
        return rows

    @property
    def scores(self) -> list[list[Tensor]]:
        """Per boundary, per prompt: score of each visual token that was ranked there, in the order they stood in."""
        read = read_back(x for ranked in self.ranked for x in (ranked.scores, ranked.before.candidates))
        rows = [[s[c] for s, c in zip(scores, candidates)] for scores, candidates in zip(read[::2], read[1::2])]
        return rows or [[torch.empty(0) for _ in self.visual] for _ in range(self.num_boundaries)]

    @property
    def tokens(self) -> list[list[int]]:
        """Per layer, per prompt: tokens that entered the layer, visual and text, without padding."""
        return self._per_layer(self.lengths)

    @property
    def visual_tokens(self) -> list[list[int]]:
        """Per layer, per prompt: visual tokens that entered the layer, merged ones included."""
        return self._per_layer(self.visual_lengths)

    def _per_layer(self, changes: dict[int, list[int]]) -> list[list[int]]:
        layers, now = [], changes.get(0, [])
        for layer in range(self.num_layers):
            now = changes.get(layer, now)
            layers.append(list(now))
        return layers
