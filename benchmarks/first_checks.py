"""The first ten minutes on a GPU: does dropping do the same there as on a CPU, and what does it cost?

    python -m benchmarks.first_checks            one GPU of 80 GB, no weights, no network; about 10 minutes
    python -m benchmarks.first_checks --only 1 4 --output results/bench
    python -m benchmarks.first_checks --tiny     the same program over a small model on the CPU: a dry run

Each check prints a line: number, subject, result, expectation, and whether it holds if there is a rule. A failed check
does not stop the others. The record is written to results/bench/; the exit code is 1 if anything failed. Needs only
torch and transformers. Models have random weights and the papers' shapes.

     1 waits for the device in a prefill and in decoding steps     6 a padded batch, prefill
     2 launches, and the attention kernels that ran                7 the same tokens twice, alone and in a batch
     3 decoding steps under each order of attention kernels        8 peak memory, and what lies outside torch's
     4 prefill against FLOPs, with the clocks                      9 static and offloaded caches, autocast
     5 decoding                                                   10 prefill under each attention backend
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from transformers.utils.import_utils import is_flash_attn_2_available

from benchmarks.bench import say
from pdrop.command_help import CommandHelp
from pdrop.cost.flops import prefill_flops
from pdrop.engine import attach
from pdrop.environment import environment
from pdrop.methods.base import Method
from pdrop.methods.cdpruner_embeddings import CDPrunerEmbeddings
from pdrop.methods.divprune import DivPrune
from pdrop.methods.fastv import FastV
from pdrop.methods.pyramiddrop import PyramidDrop
from pdrop.methods.random_drop import RandomDrop
from pdrop.methods.scope import SCOPE
from pdrop.methods.sparsevlm import SparseVLM
from pdrop.methods.sparsevlm_schedules import sparsevlm
from pdrop.models import shipped
from pdrop.models.attention import resolved, sdpa_order
from pdrop.runs.device import of_the_device, unusable, usable
from pdrop.schedule import Schedule, pyramid, single
from pdrop.shapes import ModelSizes, PromptSize
from pdrop.store import write_atomically
from pdrop.timing.clock import time_call
from pdrop.timing.conditions import conditions
from pdrop.timing.memory import peak
from pdrop.timing.nvidia import clocks_at_work
from pdrop.timing.paired import prefill, prefill_ratio
from pdrop.timing.protocol import TimingProtocol

LAYERS, TEXT_ID = 32, 5
SIDES: dict[str, tuple[Method, Schedule] | None] = {
    "none": None,
    "PyramidDrop": (PyramidDrop(), pyramid(LAYERS)),
    "PyramidDrop, original": (PyramidDrop(positions="original"), pyramid(LAYERS)),
    "FastV": (FastV(), single(2, 0.5)),
}
DROPPING: dict[str, tuple[Method, Schedule]] = {name: side for name, side in SIDES.items() if side is not None}
# their waits are counted, too: methods that merge, and that choose one token after another
WAITING: dict[str, tuple[Method, Schedule]] = {
    "SparseVLM": (SparseVLM(), sparsevlm(LAYERS, 1 / 3)),
    "DivPrune": (DivPrune(), single(0, 1 / 3)),
    "SCOPE": (SCOPE(), single(0, 1 / 3)),
    "CDPruner, embeddings": (CDPrunerEmbeddings(), single(0, 1 / 3)),
    "random": (RandomDrop(), pyramid(LAYERS)),
}
STATIC = {"cache_implementation": "static"}


@dataclass(frozen=True)
class CardCheck:
    """One check: `holds` is None without a rule, and False if it fails or raises."""

    number: int
    what: str
    result: Any
    expected: str
    holds: bool | None
    seconds: float


class Card:
    """The device, and models of random weights on it.

    Args:
        tiny: A small model on the CPU instead.
    """

    def __init__(self, tiny: bool) -> None:
        self.tiny, self.device = tiny, torch.device("cpu" if tiny else "cuda")
        self.name = "llava_1_5_7b"
        self.model = self.build(self.name)
        self.one = self.inputs(self.model, self.name)
        self.rounds = 1 if tiny else 6

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def build(self, name: str, backend: str = "sdpa") -> Any:
        """A shipped architecture in bfloat16; tiny: the same number of layers, of width 32, in float32."""
        if not self.tiny:
            return shipped.build(name, dtype="bfloat16", attn_implementation=backend, device="cuda")
        text: dict[str, Any] = dict(model_type="llama", vocab_size=1000, hidden_size=32, intermediate_size=48)
        text |= dict(num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2)
        tower: dict[str, Any] = dict(model_type="clip_vision_model", hidden_size=16, intermediate_size=24)
        tower |= dict(num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7)
        config = transformers.LlavaConfig(text_config=text, vision_config=tower, image_token_index=999)
        torch.manual_seed(0)
        model: Any = transformers.LlavaForConditionalGeneration(config).eval()
        model.set_attn_implementation(backend)
        return model

    def inputs(self, model: Any, name: str, batch: int = 1, padded: bool = False) -> dict[str, Any]:
        """Prompts on the device; padded: row n has n tokens of padding on the left."""
        made = shipped.noise_prompt(model.config, self.size(name), batch=batch)
        for row in range(batch if padded else 0):
            made["attention_mask"][row, :row] = 0
        return {k: v.to(self.device, model.dtype if v.is_floating_point() else None) for k, v in made.items()}

    def size(self, name: str) -> PromptSize:
        """The size in tokens of one prompt of this architecture."""
        return PromptSize(20, 16, images=1) if self.tiny else shipped.reference_prompt(name)

    def side(self, name: str) -> Any:
        """A block in which the model drops with this method and schedule."""
        side = (SIDES | WAITING)[name]
        return contextlib.nullcontext() if side is None else attach(self.model, *side)

    def flops_ratio(self, name: str) -> float:
        """FLOPs of a prefill / the unpruned one's."""
        method, schedule = DROPPING[name]
        sizes = ModelSizes.from_config(self.model.config)
        left = self.size(self.name).under(method, schedule, sizes.layers)
        return (
            prefill_flops(sizes, left, method.selection(schedule, left, sizes))["total"]
            / prefill_flops(sizes, left.undropped())["total"]
        )

    def ratio(self, model: Any, inputs: Any, name: str) -> float:
        """Time of a prefill / the unpruned one's: median of pairs."""
        protocol = TimingProtocol("check", warmup=3, pairs=2 * self.rounds)
        return prefill_ratio(model, inputs, *DROPPING[name], protocol)[2].median

    @torch.inference_mode()
    def steps(self, name: str, number: int) -> list[float]:
        """Milliseconds of decoding steps after a prefill."""
        with self.side(name):
            step = self.step(prefill(self.model, self.one).past_key_values)
            return [time_call(step, self.device).wall_ms for _ in range(number)]

    def step(self, cache: Any) -> Callable[[], Any]:
        """One decoding step on a cache, called again and again."""
        ids = torch.full((1, 1), TEXT_ID, device=self.device)
        return lambda: self.model(input_ids=ids, past_key_values=cache, use_cache=True)

    def generate(self, **options: Any) -> torch.Tensor:
        """The prompt and eight new tokens, greedily."""
        options |= {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        tokens: torch.Tensor = self.model.generate(**self.one, **options)
        return tokens


def counted(call: Callable[[], Any], on_gpu: bool) -> dict[str, int]:
    """Where the host waited for the device, and how often; not known on a CPU."""
    if not on_gpu:
        call()
        return {}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # torch also remarks that it may miss some, once, which is no wait
    waited = [one for one in found if "called a synchronizing" in str(one.message)]
    return dict(Counter(f"{Path(one.filename).name}:{one.lineno}" for one in waited))


@torch.inference_mode()
def waits(card: Card, name: str) -> tuple[Any, bool | None]:
    """Waits in a prefill and in a decoding step, less the unpruned model's: 1 and 0."""
    found: dict[str, list[dict[str, int]]] = {}
    for side in ("none", name):
        with card.side(side):
            step = card.step(prefill(card.model, card.one).past_key_values)
            step()
            found[side] = [counted(call, card.on_gpu) for call in (lambda: prefill(card.model, card.one), step)]
    more = [sum(this.values()) - sum(none.values()) for this, none in zip(found[name], found["none"])]
    return {"more": more, "where": found[name]}, (more[0] <= 1 and more[1] <= 0) if card.on_gpu else None


@torch.inference_mode()
def launches(card: Card, name: str) -> tuple[Any, bool | None]:
    """Launches in a prefill and in a decoding step, and the names of the attention kernels."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if card.on_gpu else []
    found = {}
    with card.side(name):
        step = card.step(prefill(card.model, card.one).past_key_values)
        step()
        for what, call in (("prefill", lambda: prefill(card.model, card.one)), ("step", step)):
            with torch.profiler.profile(activities=kinds) as profile:
                call()
            seen = Counter(event.name for event in profile.events())
            words = ("cudnn_generated", "flash_fwd", "fmha_cutlass", "scaled_dot_product")
            kernels = sorted(kernel[:60] for kernel in seen if any(word in kernel for word in words))
            launched = sum(n for kernel, n in seen.items() if "LaunchKernel" in kernel)
            found[what] = {"launches": launched if card.on_gpu else None, "kernels": kernels[:4]}
    return found, None


def orders(card: Card) -> tuple[Any, bool | None]:
    """Median and worst of 24 steps, each of a new length: cuDNN's plans show in the worst, flash has none."""
    found = {}
    for order in ("flash", "cudnn", "flash") if card.on_gpu else ("flash",):
        with sdpa_order(order):
            steps = {name: card.steps(name, 24) for name in ("none", "PyramidDrop")}
        found[order] = {name: [round(median(ms), 2), round(max(ms[1:]), 2)] for name, ms in steps.items()}
    plain = [worst < 5 * usual for usual, worst in found["flash"].values()]
    return found, all(plain) if card.on_gpu else None


def decoding(card: Card, name: str) -> tuple[Any, bool | None]:
    """Medians of interleaved steps, this / none."""
    number, first = (4, 1) if card.tiny else (40, 5)
    ms: dict[str, list[float]] = {name: [], "none": []}
    for side in ms:
        card.steps(side, number)
    for _ in range(card.rounds):
        for side, values in ms.items():
            values += card.steps(side, number)[first:]
    this, none = median(ms[name]), median(ms["none"])
    return {"ms": [round(this, 3), round(none, 3)], "ratio": round(this / none, 3)}, None


def same_tokens(card: Card) -> tuple[Any, bool | None]:
    """Which tokens stay, twice alone and in a batch of four: the second pair may differ by near-ties."""
    four = {name: torch.cat([x] * 4) for name, x in card.one.items()}
    kept = []
    for inputs in (card.one, card.one, four):
        with attach(card.model, *DROPPING["PyramidDrop"]) as trace:
            prefill(card.model, inputs)
        kept.append([set(boundary[0].tolist()) for boundary in trace.kept])
    differ = [len(alone ^ together) for alone, together in zip(kept[0], kept[2])]
    return {"twice": kept[0] == kept[1], "differ in a batch": differ}, kept[0] == kept[1]


def memory(card: Card) -> tuple[Any, bool | None]:
    """Peaks of a prefill in GiB over the weights, eight prompts at once."""
    eight = card.inputs(card.model, card.name, 2 if card.tiny else 8)
    found: dict[str, Any] = {}
    for name in ("none", "PyramidDrop", "FastV"):
        with card.side(name):
            prefill(card.model, eight)
            needed = peak(lambda: prefill(card.model, eight), card.device)
        found[name] = {kind: None if n is None else round(n / 2**30, 3) for kind, n in needed.items()}
    seen = conditions(card.model)
    outside = {name: seen[name] for name in ("outside_gib", "others_gib")}
    holds = (
        all(found[name]["allocated"] <= 1.02 * found["none"]["allocated"] for name in found) if card.on_gpu else None
    )
    return found | outside, holds


def static(card: Card) -> tuple[Any, bool | None]:
    """A static cache, for which `generate` compiles, after an unattached call: the same tokens as without one."""
    card.generate(**STATIC)
    with card.side("PyramidDrop"):
        same = torch.equal(card.generate(), card.generate(**STATIC))
    return same, same


def offloaded(card: Card) -> tuple[Any, bool | None]:
    """FastV reads cached keys, which an offloaded cache has moved off the device."""
    if not card.on_gpu:
        return "there is nothing to offload from on a CPU", None
    with card.side("FastV"):
        same = torch.equal(card.generate(), card.generate(cache_implementation="offloaded"))
    return same, same


def autocast(card: Card) -> tuple[Any, bool | None]:
    """SparseVLM, which merges, under autocast."""
    labels = card.one["input_ids"].clone()
    labels[:, :-3] = -100
    method, schedule = SparseVLM(), pyramid(LAYERS)
    with torch.no_grad(), torch.autocast(card.device.type, torch.bfloat16), attach(card.model, method, schedule):
        loss = float(card.model(**card.one, labels=labels).loss)
    return loss, math.isfinite(loss)


def backends(card: Card, backend: str) -> tuple[Any, bool | None]:
    """Prefill of a long prompt under each backend: the ratio contains no waits of the backend's own."""
    if backend == "flash_attention_2" and not is_flash_attn_2_available():
        return "the package flash-attn is not installed", None
    model = card.build("llava_next_7b", backend)
    found = card.ratio(model, card.inputs(model, "llava_next_7b"), "PyramidDrop")
    return round(found, 3), None


def prefills(card: Card, name: str) -> tuple[Any, bool | None]:
    """The ratio of times, the ratio of FLOPs, and the GPU's clocks under load."""
    found = card.ratio(card.model, card.one, name)
    clocks = clocks_at_work(lambda: prefill(card.model, card.one), card.device) if card.on_gpu else {}
    return {"time": round(found, 3), "FLOPs": round(card.flops_ratio(name), 3)} | clocks, None


def padded(card: Card) -> tuple[Any, bool | None]:
    """Left-padded rows, of which no mask is left after the first drop."""
    inputs = card.inputs(card.model, card.name, 2 if card.tiny else 8, padded=True)
    return round(card.ratio(card.model, inputs, "PyramidDrop"), 3), None


def plan(card: Card) -> list[tuple[int, str, Callable[[], tuple[Any, bool | None]], str]]:
    """The checks: number, subject, call, expectation."""
    several = [name for name in DROPPING if not card.tiny or name == "PyramidDrop"]
    once = "1 more in a prefill, none in a step"
    slower = "at most 2 launches per stage more than none, so near 1"
    kinds = ("sdpa",) if card.tiny else ("sdpa", "flash_attention_2", "eager")
    return [
        *((1, f"waits, {n}", lambda n=n: waits(card, n), once) for n in (*several, *WAITING)),
        *((2, f"launches, {n}", lambda n=n: launches(card, n), "flash kernels") for n in ("none", *several)),
        (3, "24 steps, [median, worst] ms", lambda: orders(card), "flash: no step of a new length waits"),
        *((4, f"prefill, {n}", lambda n=n: prefills(card, n), "time near FLOPs") for n in several),
        *((5, f"decoding, {n}", lambda n=n: decoding(card, n), slower) for n in several),
        (6, "prefill of a padded batch", lambda: padded(card), "at or below the ratio of one prompt"),
        (7, "the same tokens", lambda: same_tokens(card), "twice; in a batch up to near-ties"),
        (8, "peaks in GiB", lambda: memory(card), "dropping needs no more"),
        (9, "static cache", lambda: static(card), "the same tokens"),
        (9, "offloaded cache, FastV", lambda: offloaded(card), "the same tokens"),
        (9, "autocast, SparseVLM", lambda: autocast(card), "a finite loss"),
        *((10, f"long prefill, {kind}", lambda kind=kind: backends(card, kind), "alike") for kind in kinds),
    ]  # fmt: skip


def tried(number: int, what: str, call: Callable[[], tuple[Any, bool | None]], expected: str) -> CardCheck:
    """A check's outcome; one that raises has failed."""
    started = time.perf_counter()
    try:
        result, holds = call()
    except Exception as error:  # the other checks are useful without it
        logging.getLogger("pdrop").debug("check %d", number, exc_info=True)
        result, holds = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}", False
    return CardCheck(number, what, result, expected, holds, round(time.perf_counter() - started, 1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks; returns how many failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=CommandHelp)
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU, no record")
    parser.add_argument("--only", nargs="+", type=int, metavar="N", help="numbers of the checks")
    parser.add_argument("--output", type=Path, default=Path("results/bench"), help="folder of the record")
    options = parser.parse_args(arguments)
    if not options.tiny and not usable():
        parser.error(f"{unusable() or 'torch sees no GPU here'}; --tiny is a dry run on the CPU")
    started, outcomes = time.time(), []
    try:
        card = Card(options.tiny)
    except RuntimeError as error:
        if not of_the_device(error):
            raise
        parser.error(f"no room for the first model: {str(error).splitlines()[0]}; nvidia-smi shows who uses the card")
    with sdpa_order(resolved(None, "sdpa", card.device.type)):  # as runs and trainings take kernels
        for check in plan(card):
            if options.only is None or check[0] in options.only:
                outcomes.append(one := tried(*check))
                verdict = {None: "", True: "  holds", False: "  FAILS"}[one.holds]
                line = f"{one.number:2d} {one.what}: {one.result} | expected: {one.expected}"
                say(f"{line} ({one.seconds:.0f} s){verdict}")
        seen = conditions(card.model)
    failed = sum(one.holds is False for one in outcomes)
    say(f"{len(outcomes)} checks, {failed} failed")
    if not options.tiny:
        record = {"format": 1, "model": card.name, "conditions": seen}
        record |= {"checks": [asdict(one) for one in outcomes], "environment": environment("cuda")}
        path = options.output / f"first_checks-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(started))}.json"
        write_atomically(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
        say(f"record: {path}")
    return failed


if __name__ == "__main__":
    sys.exit(min(1, main()))
