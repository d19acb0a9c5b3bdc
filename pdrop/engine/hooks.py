"""The only code that registers hooks.

A pre-hook on the vision-language model reads the prompt. Pre-hooks on the decoder layers do the rest: that of a
boundary layer ranks the visual tokens and gathers the rows that stay, those after it give each layer the rotary
embeddings and the mask of the shorter sequence. A hook on the last layer puts the rows back where they came from.

Reading the prompt synchronises with the device once per prefill and never in a decoding step: afterwards all lengths
are Python integers. What later forwards must know about the shortened keys is stored on the cache itself, so it follows
deep copies, beams, crops and several caches in use. The state of a running forward belongs to its thread.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.masking_utils import create_causal_mask

from pdrop.engine import autocast, callers, deepstack, early
from pdrop.engine.angles import Angles
from pdrop.engine.architecture import Rotary, check_fit, read_architecture
from pdrop.engine.layer_hooks import LayerHooks
from pdrop.engine.merging_tower import reader
from pdrop.engine.pictures import read_layout
from pdrop.engine.prefill import Prefill
from pdrop.engine.probe import probe
from pdrop.engine.ranking import cached_keys, cut, view, with_plan
from pdrop.engine.sequence import Alive, Marks, Prompts, read_prompts, take
from pdrop.engine.state import Forward, KeyMask, Past
from pdrop.engine.study import note
from pdrop.engine.threads import Ended, Running, Threads
from pdrop.engine.trace import Trace
from pdrop.engine.visual import encoded, visual_tokens
from pdrop.methods.base import Method
from pdrop.methods.view import question_of
from pdrop.schedule import Schedule

ENTERING = threading.Lock()  # if two threads attach at the same time the second is refused


class Attachment:
    """A context manager; see pdrop.engine.attach. `trace` may be read inside the block and after it."""

    def __init__(self, model: nn.Module, method: Method | None, schedule: Schedule, tokenizer: Any = None):
        self.architecture = read_architecture(model)
        check_fit(self.architecture, model, method, schedule)
        self.turns = probe(self.architecture.decoder, self.architecture.layers) if schedule else ()
        self.method, self.schedule, self.tokenizer = method or Method(), schedule, tokenizer
        self.boundaries = {stage.layer: stage for stage in schedule}
        # which boundary's ranking is observed on the input of which layer
        self.observed = {stage.layer + self.method.at(stage).observe for stage in schedule}
        self.begins = type(self.method).begin is not Method.begin  # most methods need no hook on the first layer
        self.acts = self.observed | {stage.layer for stage in schedule} | {0}  # others only get mask and positions
        self.studies = bool(schedule) and all(stage.keep == 1 for stage in schedule)  # ranks without dropping
        self.tower = reader(self.architecture.vlm, self.method) if schedule else None
        self.trace = Trace(len(self.architecture.layers), len(schedule))
        self.current = Running()
        decoder: Any = self.architecture.decoder
        self.angles = Angles(decoder.rotary_emb)
        self.handles: list[Any] = []
        self.layer_hooks = LayerHooks((), ())
        vlm: Any = self.architecture.vlm
        # the inner model too: a wrapper may call it, or .forward, and bypass the outer model's hooks
        self.hooked: list[nn.Module] = list({id(m): m for m in (vlm, getattr(vlm, "model", vlm))}.values())

    @property
    def run(self) -> Forward | None:
        """The state of the forward that runs in this thread, if the engine has anything to do in it."""
        return self.current.run

    @property
    def prefill(self) -> Prefill:
        """The record of this thread's forward, if it brought visual tokens."""
        assert self.current.prefill is not None
        return self.current.prefill

    def __enter__(self) -> Trace:
        with ENTERING:
            for hook in self.architecture.vlm._forward_pre_hooks.values():
                other = getattr(getattr(hook, "func", None), "__self__", None)
                if isinstance(other, Attachment):
                    raise RuntimeError(
                        f"{type(other.method).__name__} ({other.schedule}) is attached to this model already: "
                        "leave its with block first"
                    )
            self.threads = Threads(
                f"the with block of {type(self.method).__name__} ({self.schedule}) has ended while this thread was "
                "generating: join the thread inside the block"
            )
            self.trace.home = threading.get_ident()
            self.register()
            # `generate` compiles by itself with a static cache on CUDA, and such a graph does not see hooks
            uncompiled: Any = self.architecture.vlm
            uncompiled.get_compiled_call = MethodType(not_compiled, uncompiled)
        return self.trace

    def register(self) -> None:
        decoder, layers = self.architecture.decoder, self.architecture.layers
        for module in self.hooked:
            names = list(inspect.signature(type(module).forward).parameters)[1:]
            self.handles.append(module.register_forward_pre_hook(partial(self.open, names), with_kwargs=True))
            self.handles.append(module.register_forward_hook(self.close, always_call=True))
        if self.boundaries:
            self.layer_hooks = LayerHooks((decoder, *layers), list(self.around_layers()))
            self.layer_hooks.on()
        for module, when, hook in self.tower.hooks() if self.tower is not None else []:
            before = when == "before"
            handle: Any = module.register_forward_pre_hook(hook, with_kwargs=True) if before else None
            self.handles.append(handle or module.register_forward_hook(hook))

    def around_layers(self) -> Iterator[Callable[[], RemovableHandle]]:
        """Functions that each register one hook on the decoder and its layers."""
        decoder, layers, first = self.architecture.decoder, self.architecture.layers, min(self.observed)
        adds = "deepstack_visual_embeds" in inspect.signature(type(decoder).forward).parameters
        if adds:
            yield partial(decoder.register_forward_pre_hook, self.take_deepstack, with_kwargs=True)
        for number, layer in enumerate(layers):
            if number >= first or (number == 0 and (self.begins or self.studies)):
                yield partial(layer.register_forward_pre_hook, partial(self.enter, number), with_kwargs=True)
            # before other hooks: FSDP's frees the layer's weights. The hook registered last runs first
            if number + 1 in self.boundaries and self.method.at(self.boundaries[number + 1]).observe < 0:
                watch = partial(self.watch, number)
                yield partial(layer.register_forward_hook, watch, with_kwargs=True, prepend=True)
            if adds:  # before it is watched: its output enters the boundary
                yield partial(layer.register_forward_hook, partial(self.add_deepstack, number), prepend=True)
        yield partial(layers[-1].register_forward_hook, self.leave)

    def rest(self) -> None:
        """A plain decoding step: no layer hook is needed, unless by another thread's forward."""
        if self.layer_hooks.are_on:
            with self.threads.change:
                if self.threads.busy <= {threading.get_ident()} and self.layer_hooks.alone():
                    self.layer_hooks.off()

    def __exit__(self, *exception: object) -> None:
        self.threads.end()
        generating = callers.running(callers.GENERATE, self.hooked[0])
        generating.pop(threading.get_ident(), None)
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.layer_hooks.off()
        self.architecture.vlm.__dict__.pop("get_compiled_call", None)
        self.current.clear()
        if generating:
            late = Ended(self.hooked, generating, self.threads.words)
            late.handles = [one.register_forward_pre_hook(late.refuse, prepend=True) for one in self.hooked]

    # ---------------------------------------------------------------- around the model

    def open(self, names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward begins: read the prompt, unless this is a decoding step with nothing to do."""
        if not self.current.opens(module, module is self.hooked[0]):
            return
        self.threads.enter()
        self.current.clear()
        self.current.owner = module
        given = dict(zip(names, args)) | kwargs
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        cache: Any = early.cache_of(given)
        if ids is None:
            raise ValueError("token dropping needs input_ids, which say where the visual tokens are: pass them")
        if given.get("cu_seq_lens_q") is not None:
            raise ValueError("token dropping does not read packed sequences (cu_seq_lens_q): pad them instead")
        past, new = getattr(cache, "_pdrop", None), ids.shape[1]
        if past is not None:
            past.check(self.schedule, self.method.positions)
        if new == 1 and (past is None or self.plain(past, mask)):
            self.rest()
            return
        if isinstance(mask, dict):  # generate prepares masks for a static cache
            mask = mask["full_attention"]
        if mask is not None and mask.ndim == 4:
            mask = (mask if mask.dtype == torch.bool else mask == 0)[:, 0, -1, : int(cache.get_seq_length()) + new]
        prompts = self.read(given, mask) if new > 1 else None
        droppable = prompts is not None and any(prompts.droppable)
        if droppable and self.boundaries:
            self.check_call(given)
        if self.boundaries and (droppable or past is not None):
            padded = prompts is not None and prompts.padded
            alive = Alive.all_of(prompts) if prompts is not None else None
            run = Forward(prompts if droppable else None, alive, mask, padded, self.turns, self.trace.samples)
            if prompts is not None:
                run.layout = partial(read_layout, self.architecture.vlm, given, prompts)
                if self.tower is not None:
                    run.tower = functools.cache(partial(self.tower.of, given, prompts))
                if self.tokenizer is not None:
                    run.texts = functools.cache(partial(texts, self.tokenizer, prompts.host))
            run.norm = getattr(self.architecture.decoder, "norm", run.norm)
            run.study = self.studies and self.trace.study
            with self.threads.change:
                self.layer_hooks.on()
            self.current.run = run

    def read(self, given: dict[str, Any], mask: Tensor | None) -> Prompts:
        """Read the input; if it is a prompt, not a draft or later text on a cache, its prefill begins."""
        ids, cache = given["input_ids"], early.cache_of(given)
        new = None if mask is None else mask[:, -ids.shape[1] :]
        visual = partial(visual_tokens, given=given, config=self.architecture.vlm.config)
        # positions show packed rows only if neither a mask nor a cache says what they are
        positions = given.get("position_ids") if given.get("attention_mask") is None and cache is None else None
        asked = given.get("logits_to_keep")
        asked = asked if isinstance(asked, int) else 0
        beside = self.tower.asks(given) if self.tower is not None else ()
        prompts = read_prompts(ids, new, visual, given.get("labels"), positions, asked, beside)
        begins = cache is None or not int(cache.get_seq_length())
        if any(prompts.visual_counts) or (begins and not callers.unconditional()):
            self.current.prefill = self.trace.begin()
            self.current.prefill.start(prompts.visual_counts, prompts.lengths, prompts.host.numbers)
        return prompts

    def check_call(self, given: dict[str, Any]) -> None:
        """Refuse calls that do not show the whole instruction.

        Raises:
            ValueError: Saying what to pass instead.
        """
        training = self.architecture.decoder.training and torch.is_grad_enabled()
        if training and given.get("labels") is None:
            raise ValueError(
                "in training, token dropping needs labels, which say where the instruction ends: call "
                f"{type(self.architecture.vlm).__name__} itself (not its .forward, nor its .model) with labels="
            )
        if encoded(given) and callers.chunked():
            raise ValueError(
                "with prefill_chunk_size the instruction is not there when an image's chunk is ranked: leave it out"
            )

    def plain(self, past: Past, mask: Any) -> bool:
        """Whether a decoding step's own mask and positions, made for the cache of layer 0, are right for all layers."""
        two_dimensional = mask is None or getattr(mask, "ndim", 0) == 2
        whole = not past.padded and all(keys is None for keys in past.whole.values())
        return whole and self.causal_kernel and two_dimensional and self.method.positions == "original"

    @property
    def causal_kernel(self) -> bool:
        """Whether the attention backend needs no mask where every key is a token."""
        kind = self.architecture.decoder.config._attn_implementation or ""
        return kind == "sdpa" or kind.startswith("flash")

    def close(self, module: nn.Module, args: Any, output: Any) -> None:
        """A forward ends, also by an exception (then without output)."""
        if self.current.owner is not module:
            return
        prefill = self.current.prefill
        self.current.clear()
        self.threads.leave()
        if self.tower is not None:
            self.tower.close()
        if prefill is not None and output is not None:
            self.trace.show(prefill)

    # ---------------------------------------------------------------- around a layer

    def enter(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The input of decoder layer `number`: shortened at a boundary; later, with the stage's mask and positions."""
        run = self.current.run
        if run is None:
            return None
        if number not in self.acts:
            return (args, kwargs | run.handed) if run.handed else None
        hidden, cache, given = args[0], early.cache_of(kwargs), kwargs["position_embeddings"]
        if run.prompts is not None and number == 0 and self.begins:
            seen = view(run, number, layer, hidden, given)
            with autocast.off(hidden):
                run.begun = self.method.begin(seen)
        if run.prompts is not None and run.study and (number == 0 or number in self.boundaries):
            self.prefill.noted.append(note(view(run, number, layer, hidden, self.rotary(run, hidden, given))))
        if run.prompts is not None and (number in self.boundaries or number in self.observed):
            hidden = self.drop(run, number, layer, hidden, given)
        if number in self.boundaries:
            if not number and cache is not None and (lost := args[0].shape[1] - hidden.shape[1]):
                early.lose(cache, lost)
            self.begin_stage(run, number, hidden, cache)
            if run.staged:
                run.handed = {
                    "position_embeddings": self.rotary(run, hidden, given),
                    "attention_mask": self.mask(run, number, hidden, cache),
                    # only flash attention reads these, and mistakes gaps for the ends of packed sequences
                    "position_ids": None,
                }
        return (hidden, *args[1:]), kwargs | run.handed

    def watch(self, number: int, layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Rank by a layer that has just run: its keys are in the cache, and need not be computed again."""
        run = self.run
        if run is None or run.prompts is None:
            return
        hidden = args[0]
        keys = cached_keys(early.cache_of(kwargs), number, hidden.shape[1])
        stage = self.boundaries[number + 1]
        rotary = kwargs["position_embeddings"]
        seen = view(run, number, layer, hidden, rotary, stage, keys, output)
        method = self.method.at(stage)
        with autocast.off(hidden):
            run.pending = method.score(with_plan(run, method, seen))

    def drop(self, run: Forward, number: int, layer: nn.Module, hidden: Tensor, given: Rotary) -> Tensor:
        """At a boundary: rank, and keep the rows that stay; merge some that go. [B, T, D] -> [B, T', D]."""
        assert run.prompts is not None and run.alive is not None
        hidden = hidden.to(next(layer.parameters()).device)  # under a device map the layers are on several
        run.alive = run.alive.to(hidden.device)
        stage = self.boundaries.get(number)
        if stage is None:
            return hidden
        seen = view(run, number, layer, hidden, self.rotary(run, hidden, given), stage)
        method = self.method.at(stage)
        with autocast.off(hidden):
            scores = run.pending if method.observe < 0 else method.score(with_plan(run, method, seen))
            assert scores is not None
            run.pending = None
            hidden, ranked = cut(run, method, seen, scores)
        self.prefill.boundary(number, run.alive.lengths, run.alive.visual_counts, ranked)
        return hidden

    def begin_stage(self, run: Forward, number: int, hidden: Tensor, cache: Any) -> None:
        """Which keys of the layers from `number` on are tokens, past ones included? Noted on the cache."""
        past, new = getattr(cache, "_pdrop", None), hidden.shape[1]
        run.memo, run.handed = {}, {}
        run.staged = run.dropped or past is not None
        if not run.staged:
            return
        run.past = 0 if cache is None else early.held(cache, number)
        noted = past.whole.get(number) if past is not None else None
        known = noted
        if known is None and run.past and run.mask is not None and (past is None or number not in past.whole):
            known = KeyMask.of(run.mask[:, : run.past].bool().to(hidden.device))
        if run.alive is not None and (run.alive.ragged or known is not None):
            ones = hidden.new_ones(len(hidden), run.past, dtype=torch.bool)
            earlier = ones if known is None else known.tokens[:, : run.past].to(hidden.device)
            known = KeyMask.of(torch.cat([earlier, run.alive.valid], 1))
        run.whole = run.held = None
        if known is not None:
            known = known.reaching(run.past + new)
            run.whole = known.tokens[:, : run.past + new]
            run.held = known if run.alive is None else None
        if cache is not None and (past is None or number not in past.whole or known is not noted):
            whole = past.whole if past is not None else {}
            padded = run.padded or (past is not None and past.padded)
            cache._pdrop = Past(self.schedule, self.method.positions, whole | {number: known}, padded)

    def rotary(self, run: Forward, hidden: Tensor, given: Rotary) -> Rotary:
        """(cos, sin) of the tokens of the current stage, each [B or 1, T, head size]."""
        if not run.staged or (self.method.positions == "original" and not run.dropped):
            return given
        if "rotary" not in run.memo:
            end = run.past + hidden.shape[1]
            if self.method.positions == "original":
                assert run.alive is not None
                run.memo["rotary"] = tuple(take(x, run.alive.index) for x in given)
            elif run.whole is None:
                run.memo["rotary"] = self.angles.between(hidden, run.past, end)
            elif run.held is not None:
                run.memo["rotary"] = self.angles.at(hidden, run.held.count(run.past), end)
            else:
                places = (run.whole.cumsum(1) - 1).clamp(min=0)[:, -hidden.shape[1] :]
                run.memo["rotary"] = self.angles.at(hidden, places, end)
        made: tuple[Tensor, Tensor] = run.memo["rotary"]
        return made

    def mask(self, run: Forward, number: int, hidden: Tensor, cache: Any) -> Any:
        """The attention mask of the current stage, in the form that the model's attention backend expects."""
        grows, kind = not getattr(cache, "is_compileable", False), self.architecture.decoder.config._attn_implementation
        if run.prompts is None and hidden.shape[1] == 1 and grows:
            # create_causal_mask would find this out by waiting for the device, in every stage of every decoding step
            if run.whole is None and (self.causal_kernel or kind == "eager"):
                return None
            if run.whole is not None and self.causal_kernel:
                return run.whole[:, None, None] if kind == "sdpa" else run.whole
            if run.whole is not None and kind == "eager":
                lowest = torch.finfo(hidden.dtype).min
                return torch.where(run.whole[:, None, None], hidden.new_zeros(()), lowest)
        whole = run.whole
        if run.prompts is not None and run.dropped and not run.past:
            whole = None  # tokens come first in each row: causality alone hides the padding after them
            if grows and self.causal_kernel:
                return None
        # a cache cut before layer 0 counts dropped tokens, the mask must not
        keys: Any = cache if number or cache is None else early.Keys(run.past)
        # by position: transformers 5.24 calls the cache by another name
        return create_causal_mask(self.architecture.decoder.config, hidden, whole, keys, layer_idx=number)

    def leave(self, layer: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """After the last layer: every row back to its place in the padded prompt, zeros elsewhere. [B, L, D]."""
        run = self.run
        if run is None or not run.dropped:
            return None
        assert run.prompts is not None and run.alive is not None
        return run.alive.to(output.device).spread(output, run.prompts.ids.shape[1])

    # ---------------------------------------------------------------- visual features added after the first layers

    def take_deepstack(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """If tokens are dropped before layers that add features, withhold the features from the decoder."""
        if self.run is None or not deepstack.take_over(self.run, min(self.observed), kwargs):
            return None
        return args, kwargs | {"deepstack_visual_embeds": None}

    def add_deepstack(self, number: int, layer: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Add the withheld features after layer `number`."""
        return None if self.run is None else deepstack.add(self.run, number, output)


def not_compiled(model: nn.Module, config: Any) -> Any:
    """Replaces an attached model's compiled call: `generate` gets the plain one."""
    return model.__call__


def texts(tokenizer: Any, marks: Marks) -> list[str]:
    """The question of each prompt as text, without special tokens."""
    asked = question_of(marks.valid, marks.visual & ~marks.query, marks.query)
    rows = [row[there].tolist() for row, there in zip(marks.ids, asked)]
    found: list[str] = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return found


@contextmanager
def rows_not_packed(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[None]:
    """A block in which flash attention in the decoder gets no position ids. Used for both sides of a timing.

    With position ids, transformers' flash attention checks in each layer of a one-prompt prefill whether its rows are
    packed sequences, which waits for the device. Layers after a boundary get none, so dropping would appear faster by
    the unpruned model's 24 to 30 waits. Rotary embeddings, which are made before the layers, are unchanged. If the
    caller passes position ids of its own, nothing changes.
    """
    architecture = read_architecture(model)
    kind = str(architecture.decoder.config._attn_implementation or "")
    if "flash" not in kind or inputs.get("position_ids") is not None:
        yield
        return
    # not on the layers: an attachment takes its hooks off in a plain step only if no other hooks are there
    attentions: list[Any] = [layer.self_attn for layer in architecture.layers]
    handles = [attention.register_forward_pre_hook(without_ids, with_kwargs=True) for attention in attentions]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def without_ids(attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """The input of a layer's attention, without position ids."""
    return args, kwargs | {"position_ids": None}
