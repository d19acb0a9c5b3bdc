"""What an attachment has done: the prefills that it has seen, of which the last can be read.

Each forward writes a `Prefill` of its own, which is shown once the forward has ended well: a forward that fails, or
one that runs in another thread, leaves what is read of the last one as it is.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from torch import Tensor

from pdrop.engine.prefill import MergedToken, Prefill
from pdrop.engine.study import LayerAttention


class Here(threading.local):
    """What a thread has set and seen of a trace."""

    last: Prefill | None = None
    samples: list[str] | None = None
    study: bool | None = None


@dataclass(repr=False)
class Trace:
    """Report of the last prefill: the last forward that brought images, or began a cache with text alone.

    Decoding steps, drafts of speculative decoding, later text on a cache and the unconditional prompt of
    classifier-free guidance are none. The thread that attached reads the last prefill of all; another thread reads its
    own last one, if it has made any. Who reads several attributes while other threads go on reads them from one `last`.

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
        """A few lines: prompts, and tokens per layer (all layers are in `tokens`, what stays in `kept`)."""
        seen = f"{self.prefills} prefill{'' if self.prefills == 1 else 's'} of {self.num_layers} layers seen"
        return f"Trace: {seen}\n{self.last}" if self.prefills else f"Trace: {seen}"

    def begin(self) -> Prefill:
        """A prefill to be written."""
        return Prefill(self.num_layers, self.num_boundaries)

    def show(self, prefill: Prefill) -> None:
        """A prefill has ended: the trace shows it from now on."""
        with self._lock:
            self.prefills += 1
            self._last = self._here.last = prefill

    @property
    def last(self) -> Prefill:
        """The prefill that is reported, with the attributes below: it stays as it is when others follow."""
        own = None if threading.get_ident() == self.home else self._here.last
        return own or self._last or self.begin()

    # ---------------------------------------------------------------- to be set by the caller before a forward

    @property
    def samples(self) -> list[str] | None:
        """A name for each prompt of the forwards to come, mixed into the seeds of what is drawn for them.

        Without it two pictures under one question lose the same random tokens, for all image tokens have one id. What
        another thread than the attaching one sets holds for its own forwards.
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
        """Whether `attention` is to be noted, if the schedule drops nothing. Threads as for `samples`."""
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
        """Per prompt, per layer: what its query tokens attend to. Layer 0 and the boundaries' layers.

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
        """Per boundary, per prompt: all visual tokens after it as they stand, LongTensor on the CPU.

        Original ones by their index, and -1 - m for the m-th token that was merged for this prompt.
        """
        return self.last.order

    @property
    def merged(self) -> list[list[list[MergedToken]]]:
        """Per boundary, per prompt: the tokens that were made there, in their order. Empty where nothing merges."""
        return self.last.merged

    @property
    def scores(self) -> list[list[Tensor]]:
        """Per boundary, per prompt: score of each visual token that was ranked there, in the order they stood in."""
        return self.last.scores

    @property
    def tokens(self) -> list[list[int]]:
        """Per layer, per prompt: tokens that entered the layer, visual and text, without padding."""
        return self.last.tokens

    @property
    def visual_tokens(self) -> list[list[int]]:
        """Per layer, per prompt: visual tokens that entered the layer, merged ones included."""
        return self.last.visual_tokens
