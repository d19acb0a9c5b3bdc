"""Which check must catch which fault of broken.py. A check that misses its fault checks nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pdrop.conformance import broken
from pdrop.conformance.subject import Subject
from pdrop.methods.base import Method
from pdrop.methods.fastervlm import FasterVLM
from pdrop.methods.fastv import FastV
from pdrop.methods.holov import HoloV
from pdrop.methods.pyramiddrop import PyramidDrop
from pdrop.methods.v2drop import V2Drop
from pdrop.methods.visionzip import VisionZip
from pdrop.schedule import Schedule, Stage

HALVES = Schedule((Stage(2, 0.5), Stage(4, 0.25)))


@dataclass(frozen=True)
class Fault:
    """A fault: where it was seen, the check that must catch it, the broken subject, and the kind of model."""

    name: str
    seen: str
    caught_by: str
    subject: Subject
    family: str = "llava"


def on(
    attach: Callable[[Any, Method, Schedule], Any],
    method: Method | None = None,
    early: bool = False,
    front: bool = False,
) -> Subject:
    """A broken engine with a correct method."""
    schedule = Schedule((Stage(0, 0.5), Stage(3, 0.25))) if early else Schedule((Stage(0, 0.5),)) if front else HALVES
    return Subject(getattr(attach, "__name__", "engine"), method or PyramidDrop(), lambda layers: schedule, attach)


def by(method: Method, *stages: Stage) -> Subject:
    """A broken method on the correct engine."""
    return Subject(type(method).__name__, method, lambda layers: Schedule(stages) if stages else HALVES)


IDENTITY = "nothing dropped at keep 1, to the bit"
COUNTS = "as many tokens as it says, in every layer and in the cache"
TEXT = "text is never dropped"
ORDER = "the best of its own ranking, in their order"
CAUSAL = "no token sees a later one"
ALONE = "a prompt in a batch gets what it gets alone, padded left or right"
DECODING = "a forward and cached decoding are the oracle's"
POSITIONS = "positions as declared, in the prompt and after it"
SEEDS = "the same seed, the same tokens"
GRADIENTS = "gradients flow, and the loss is the same in training"
COST = "FLOPs and KV bytes in closed form are those measured"
DETACHES = "leaves nothing behind, also after an exception"

SHOWN = "it is shown what the model computes"
PLACED = "made tokens stand where it says"
HALF_IN_FRONT = Stage(0, 0.5)

FAULTS = (
    Fault("unsorted top-k", "UniPruneBench's FastV and PDrop, DivPrune's paper", ORDER, on(broken.Unsorted)),
    Fault("unsorted top-k", "the same, in what the model computes", DECODING, on(broken.Unsorted)),
    Fault("reversed sort", "UniPruneBench's FitPrune", ORDER, on(broken.Worst)),
    Fault("one layer late", "budgets that are counted on a layer's output", COUNTS, on(broken.late)),
    Fault("one layer late", "the same, in what the model computes", DECODING, on(broken.late)),
    Fault(
        "doubled keys",
        "FastV for lmms-eval, LightCompress, UniPruneBench",
        COUNTS,
        on(broken.Doubled, FastV(several=True)),
    ),
    Fault("doubled keys", "the same, in decoding", DECODING, on(broken.Doubled, FastV(several=True))),
    Fault("stale positions, compact", "PyramidDrop with a batch", POSITIONS, on(broken.Stale)),
    Fault("stale positions, compact", "the same, in what the model computes", DECODING, on(broken.Stale)),
    Fault(
        "stale positions, original",
        "SparseVLM+ before it gathered them",
        POSITIONS,
        on(broken.Stale, FastV(several=True)),
    ),
    Fault("mask of truth values", "transformers' eager attention adds it", CAUSAL, on(broken.SeesAll)),
    Fault("mask of truth values", "the same, in what the model computes", DECODING, on(broken.SeesAll)),
    Fault("a hook is left", "modules that keep their state", DETACHES, on(broken.Leaky)),
    Fault("one token at least", "SparseVLM's code", IDENTITY, on(broken.Rounds)),
    Fault("text competes", "spans that are hard-coded and one off", TEXT, on(broken.Hungry)),
    Fault("a cache that forgot", "dropping before the decoder", COUNTS, on(broken.Rewinds, early=True)),
    Fault("unseeded draws", "FastV's K = 0, SparseVLM's density noise", SEEDS, by(broken.Lots())),
    Fault("the first of the batch for all", "every official program", ALONE, by(broken.OfTheBatch())),
    Fault("ranks by the answer", "re-ranking at each step", CAUSAL, by(broken.Hindsight())),
    Fault("no gradient", "merging under no_grad", GRADIENTS, by(broken.Severed(recycle=1.0), Stage(1, tokens=0))),
    Fault("counts of another layer", "SparseVLM's 192, which are 206.5", COUNTS, by(broken.Boastful())),
    Fault("cost left out", "selection is not free", COST, by(broken.Boastful())),
    Fault("class token for a patch", "ports to towers with one", SHOWN, on(broken.OneOff, FasterVLM(), front=True)),
    Fault(
        "another token's attention",
        "HoloV for Qwen2.5-VL: attention window by window, tokens in the picture's order",
        SHOWN,
        on(broken.Windows, HoloV(positions="original"), front=True),
        "qwen2_5_vl",
    ),
    Fault("input for output", "states taken one layer early", SHOWN, on(broken.Early, V2Drop())),
    Fault(
        "made tokens at the end",
        "VisionZip's class token",
        PLACED,
        on(broken.AtTheEnd, VisionZip(contextual=2), front=True),
    ),
    Fault("the tower for nothing", "attention of the vision tower", COST, by(broken.Free(), HALF_IN_FRONT)),
    Fault("the first picture for all", "DivPrune, HiRED", ALONE, by(broken.FirstPicture(), HALF_IN_FRONT)),
)
