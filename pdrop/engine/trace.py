"""What an attachment has done: reports the last prefill.

Each forward writes its own `Prefill`, which is shown once the forward has succeeded: a forward that fails, or runs in
another thread, does not change what is being read.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from torch import Tensor

from pdrop.engine.prefill import MergedToken, Prefill
from pdrop.engine.study import LayerAttention


class Here(threading.local):
    """What a thread has set on a trace, and its last prefill."""

    last: Prefill | None = None
    samples: list[str] | None = None
    study: bool | None = None


@dataclass(repr=False)
class Trace:
    """Report of the last prefill: the last forward that brought images, or began a cache with text alone.

    Decoding steps, drafts of speculative decoding, later text on a cache and the unconditional prompt of
    classifier-free guidance are not prefills. The thread that attached reads the last prefill of all threads; another
    thread reads its own last one, if it has any. To read several attributes while other threads continue, take `last`
    once.

    Attributes:
        prefills: Number of prefills seen since attaching, by all threads.
        home: The thread that attached.
    """

    num_layers: int
    num_boundaries: int
    prefills: int = 0
    _last: Prefill | None = None
    home: int = field(default_factory=threading.get_ident)
    _samples: list[str] | None = None
    _study: bool = False
    _here: Here = field(default_factory=Here)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __repr__(self) -> str:
        """A few lines: prompts, and tokens per layer (all layers are in `tokens`, the kept indices in `kept`)."""
        seen = f"{self.prefills} prefill{'' if self.prefills == 1 else 's'} of {self.num_layers} layers seen"
        return f"Trace: {seen}\n{self.last}" if self.prefills else f"Trace: {seen}"

    def begin(self) -> Prefill:
        """A new, empty prefill."""
        return Prefill(self.num_layers, self.num_boundaries)

    def show(self, prefill: Prefill) -> None:
        """Show a prefill that has ended."""
        with self._lock:
            self.prefills += 1
            self._last = self._here.last = prefill

    @property
    def last(self) -> Prefill:
        """The prefill that is reported, with the attributes below; later prefills do not change it."""
        own = None if threading.get_ident() == self.home else self._here.last
        return own or self._last or self.begin()

    # ---------------------------------------------------------------- to be set by the caller before a forward

    @property
    def samples(self) -> list[str] | None:
        """A name for each prompt of later forwards, mixed into the seeds of their random draws.

        Without names, two pictures with the same question lose the same random tokens, since all image tokens have the
        same id. A thread other than the attaching one sets them for its own forwards only.
        """
        return self._samples if self._here.samples is None else self._here.samples

    @samples.setter
    def samples(self, names: list[str] | None) -> None:
        if threading.get_ident() == self.home:
            self._samples = names
        else:
            self._here.samples = names

    @property
    def study(self) -> bool:
        """Whether to record `attention`, if the schedule drops nothing. Threads as for `samples`."""
        return self._study if self._here.study is None else self._here.study

    @study.setter
    def study(self, wanted: bool) -> None:
        if threading.get_ident() == self.home:
            self._study = wanted
        else:
            self._here.study = wanted

    # ---------------------------------------------------------------- to be read

    @property
    def visual(self) -> list[int]:
        """Visual tokens of each prompt, a list over the batch."""
        return self.last.visual

    @property
    def attention(self) -> list[list[LayerAttention]]:
        """Per prompt, per layer: its query tokens' attention, in layer 0 and the boundaries' layers.

        Empty lists unless `study` was set and every boundary of the schedule keeps everything.
        """
        return self.last.attention

    @property
    def kept(self) -> list[list[Tensor]]:
        """Per boundary, per prompt: ORIGINAL visual indices that stay, ascending LongTensor on the CPU.

        0 is the prompt's first visual token. Merged tokens are not among them: see `order`. Prompts without images
        have empty tensors; a batch in which nothing may be dropped keeps everything.
        """
        return self.last.kept

    @property
    def order(self) -> list[list[Tensor]]:
        """Per boundary, per prompt: all visual tokens after it in their order, LongTensor on the CPU.

        Original ones by their index, and -1 - m for the m-th token that was merged for this prompt.
        """
        return self.last.order

    @property
    def merged(self) -> list[list[list[MergedToken]]]:
        """Per boundary, per prompt: the tokens that were made there, in their order. Empty where nothing merges."""
        return self.last.merged

    @property
    def scores(self) -> list[list[Tensor]]:
        """Per boundary, per prompt: the score of each visual token ranked there, in their order before the boundary."""
        return self.last.scores

    @property
    def tokens(self) -> list[list[int]]:
        """Per layer, per prompt: tokens that entered the layer, visual and text, without padding."""
        return self.last.tokens

    @property
    def visual_tokens(self) -> list[list[int]]:
        """Per layer, per prompt: visual tokens that entered the layer, merged ones included."""
        return self.last.visual_tokens
