"""How fast dropping is, as ratios to the unpruned model in the same process, held against the FLOPs it saves.

    make bench              (about 8 minutes on one core; `python bench.py --quick`: about 1 minute)

A random LLaVA of 32 layers, width 512 (8 heads, MLP 1376), float32, one thread, 576 and 2880 visual tokens + 60 of
text, the decoder alone. Weights are random because speed does not depend on them. What is printed for each method:

    CPU, wall       time of a prefill / the unpruned model's, in turns, median of the paired ratios and its 95 % interval
    FLOPs           the same ratio in closed form (pdrop/flops.py), all of it, and with attention's causal half
    selection       time inside the attached hooks (reading the prompt, ranking, gathering, masks), measured directly,
                    as a share of the prefill that it is part of
    random twin     what ranking costs: the same schedule with tokens drawn at random
    keep = 1        attached, ranking at every boundary, dropping nothing
    decode          a step with the dropped cache / a step of the unpruned model

CPU time is the better number on a machine that others use, too. It cannot tell what batches, a server or a GPU would
show. The record goes to results/bench/.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from pdrop.engine import attach
from pdrop.flops import decode_flops, prefill_flops
from pdrop.latency import Protocol, Sample, interval, model_device, paired_ratio, prefill, take_turns, time_call
from pdrop.methods.base import Method
from pdrop.methods.fastv import FastV
from pdrop.methods.pyramiddrop import PyramidDrop
from pdrop.methods.random_drop import RandomDrop
from pdrop.environment import environment
from pdrop.record import write_atomically
from pdrop.schedule import Schedule, pyramid, single
from pdrop.sizes import Architecture

TEXT_TOKENS, IMAGE_TOKEN = 60, 999
# CPU seconds of the official programs / an unpruned sdpa model's, at these shapes, one thread, float32: measured once
# with PyramidDrop at 6444f30, FastV at d165972 (its transformers 4.31 code, in place, and its fork of 4.39), SparseVLM
# at 26a5f48. Not measured by this program.
OFFICIAL = {
    576: "PyramidDrop 0.53   FastV 0.67 (4.31) 0.72 (fork)   SparseVLM-192 0.47",
    2880: "PyramidDrop 0.43   FastV 1.04 (4.31) 0.76 (fork)   SparseVLM-192 0.34",
}


@dataclass(frozen=True)
class Case:
    """A method at its schedule."""

    name: str
    method: Method
    schedule: Schedule

    def flops_ratio(self, arch: Architecture, visual: int, total: str = "total") -> float:
        """FLOPs of the decoder's prefill / the unpruned one's."""
        layers = self.schedule.tokens_per_layer(visual, arch.layers, self.method.count)
        boundaries = self.schedule.layers if self.method.ranks_by_attention else ()
        this = prefill_flops(arch, layers, TEXT_TOKENS, boundaries=boundaries, images=0)
        return this[total] / prefill_flops(arch, [visual] * arch.layers, TEXT_TOKENS, images=0)[total]


def cases(layers: int) -> list[Case]:
    """What is compared: the papers' defaults, a random twin, and nothing dropped under full ranking."""
    return [
        Case("PyramidDrop S=4 .5", PyramidDrop(), pyramid(layers)),
        Case("its random twin", RandomDrop(positions="compact"), pyramid(layers)),
        Case("FastV K=2 .5", FastV(), single(2, 0.5)),
        Case("keep = 1", PyramidDrop(), pyramid(layers, ratio=1.0)),
    ]


def build(layers: int = 32, hidden: int = 512, heads: int = 8, intermediate: int = 1376) -> Any:
    """A LLaVA with random weights; its tower is a dwarf that is never called."""
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        text_config=dict(
            model_type="llama",
            vocab_size=1000,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=8192,
        ),
        vision_config=dict(
            model_type="clip_vision_model",
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            image_size=28,
            patch_size=14,
        ),
        image_token_index=IMAGE_TOKEN,
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def prompt(visual: int) -> dict[str, torch.Tensor]:
    """[1, visual + 60] ids: half of the text, the image's placeholders, the other half."""
    ids = torch.randint(3, 900, (1, visual + TEXT_TOKENS), generator=torch.Generator().manual_seed(0))
    ids[:, TEXT_TOKENS // 2 : TEXT_TOKENS // 2 + visual] = IMAGE_TOKEN
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# ------------------------------------------------------------------ prefill


def time_prefills(model: Any, visual: int, compared: Sequence[Case], protocol: Protocol) -> dict[str, list[Sample]]:
    """Samples of every case and of `none`, taken in turns."""
    inputs, device = prompt(visual), model_device(model)

    def side(case: Case) -> Callable[[], Sample]:
        def call() -> Sample:
            with attach(model, case.method, case.schedule):
                return time_call(lambda: prefill(model, inputs), device)

        return call

    sides = {"none": lambda: time_call(lambda: prefill(model, inputs), device)}
    return take_turns(sides | {case.name: side(case) for case in compared}, protocol)


def selection_share(model: Any, visual: int, case: Case, rounds: int) -> float:
    """Median share of a prefill that is spent inside the attachment's hooks.

    A clock stands in front of the first and behind the last hook of each module that can have some.
    """
    inputs, shares = prompt(visual), []
    for _ in range(rounds):
        spent = [0.0]
        with attach(model, case.method, case.schedule):
            handles = []
            for module in (model, model.model, model.get_decoder(), *model.get_decoder().layers):

                def start(*_: Any) -> None:
                    spent[0] -= time.process_time()  # noqa: B023 (called within this round)

                def stop(*_: Any) -> None:
                    spent[0] += time.process_time()  # noqa: B023

                handles.append(module.register_forward_pre_hook(start, prepend=True))
                handles.append(module.register_forward_pre_hook(stop))
                handles.append(module.register_forward_hook(start, prepend=True))
                handles.append(module.register_forward_hook(stop))
            whole = time_call(lambda: prefill(model, inputs), model_device(model)).cpu_ms
        for handle in handles:
            handle.remove()
        shares.append(1000 * spent[0] / whole)
    return median(shares)


def bench_prefill(model: Any, visual: int, protocol: Protocol, selection_rounds: int) -> dict[str, Any]:
    """Everything about one prompt size, as it goes into the record; prints its table."""
    arch, compared = Architecture.from_config(model.config), cases(len(model.get_decoder().layers))
    samples = time_prefills(model, visual, compared, protocol)
    base_cpu, base_wall = ([getattr(s, clock) for s in samples["none"]] for clock in ("cpu_ms", "wall_ms"))
    result: dict[str, Any] = {"visual": visual, "text": TEXT_TOKENS, "cases": {}}
    result["none"] = {"cpu_ms": asdict(interval(base_cpu, "ms")), "wall_ms": asdict(interval(base_wall, "ms"))}
    say(f"\n{visual} visual + {TEXT_TOKENS} text tokens; unpruned {median(base_cpu):.0f} ms of CPU a prefill")
    say(f"{'':20}{'CPU ratio':>9}{'95 %':>16}{'wall':>7}{'FLOPs':>8}{'causal':>8}{'off by':>8}{'selection':>11}")
    for case in compared:
        cpu, wall = ([getattr(s, clock) for s in samples[case.name]] for clock in ("cpu_ms", "wall_ms"))
        row = {
            "method": repr(case.method),
            "schedule": str(case.schedule),
            "cpu_ms": asdict(interval(cpu, "ms")),
            "wall_ms": asdict(interval(wall, "ms")),
            "cpu_ratio": asdict(paired_ratio(cpu, base_cpu)),
            "wall_ratio": asdict(paired_ratio(wall, base_wall)),
            "flops_ratio": case.flops_ratio(arch, visual),
            "flops_ratio_causal": case.flops_ratio(arch, visual, "total_causal"),
            "selection_share": selection_share(model, visual, case, selection_rounds),
        }
        result["cases"][case.name] = row
        ratio = row["cpu_ratio"]
        say(
            f"{case.name:20}{ratio['median']:9.3f}{ratio['low']:9.3f} {ratio['high']:6.3f}"
            f"{row['wall_ratio']['median']:7.3f}{row['flops_ratio']:8.3f}{row['flops_ratio_causal']:8.3f}"
            f"{100 * (ratio['median'] / row['flops_ratio'] - 1):+7.1f}%{100 * row['selection_share']:10.2f}%"
        )
    first, twin = ([s.cpu_ms for s in samples[case.name]] for case in compared[:2])
    result["ranking_by_twin"] = asdict(
        interval([(a - b) / a for a, b in zip(first, twin)], "share of PyramidDrop's prefill")
    )
    say(f"PyramidDrop - random twin: {100 * result['ranking_by_twin']['median']:+.2f} % of its prefill")
    if visual in OFFICIAL:
        say(f"official programs, same shapes: {OFFICIAL[visual]}")
    return result


# ------------------------------------------------------------------ decoding


def bench_decode(model: Any, visual: int, protocol: Protocol) -> dict[str, Any]:
    """Steps of one token on the caches that the prefills leave, in turns; each side has its own attached model."""
    arch = Architecture.from_config(model.config)
    layers = len(model.get_decoder().layers)
    compared = [
        Case("PyramidDrop compact", PyramidDrop(positions="compact"), pyramid(layers)),
        Case("PyramidDrop original", PyramidDrop(positions="original"), pyramid(layers)),
        Case("FastV", FastV(), single(2, 0.5)),
    ]
    sides: dict[str, Callable[[], Sample]] = {}
    for name, case in {"none": None, **{case.name: case for case in compared}}.items():
        # a model of its own, on the same weights: all of them stay attached while they take turns
        own = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
        if case is not None:
            attach(own, case.method, case.schedule).__enter__()
        sides[name] = decoding_side(own, visual)
    samples = take_turns(sides, protocol)
    result: dict[str, Any] = {"visual": visual, "cases": {}}
    base = [sample.cpu_ms for sample in samples["none"]]
    result["none"] = {"cpu_ms": asdict(interval(base, "ms"))}
    whole = decode_flops(arch, [visual + TEXT_TOKENS + 1] * layers)
    say(f"\na decoding step behind {visual} + {TEXT_TOKENS} tokens; unpruned {median(base):.1f} ms of CPU")
    for case in compared:
        cpu = [sample.cpu_ms for sample in samples[case.name]]
        left = [n + TEXT_TOKENS + 1 for n in case.schedule.tokens_per_layer(visual, layers, case.method.count)]
        row = {
            "cpu_ms": asdict(interval(cpu, "ms")),
            "cpu_ratio": asdict(paired_ratio(cpu, base)),
            "flops_ratio": decode_flops(arch, left) / whole,
        }
        result["cases"][case.name] = row
        ratio = row["cpu_ratio"]
        say(
            f"{case.name:20}{ratio['median']:9.3f}{ratio['low']:9.3f} {ratio['high']:6.3f}"
            f"{'':7}{row['flops_ratio']:8.3f}"
        )
    return result


def decoding_side(model: Any, visual: int) -> Callable[[], Sample]:
    """Prefill now; each call then decodes one token more, as `generate` would: with the mask of the whole prompt."""
    inputs = prompt(visual)
    cache = prefill(model, inputs).past_key_values
    mask = inputs["attention_mask"]

    def call() -> Sample:
        nonlocal mask
        mask = torch.cat([mask, mask[:, :1]], 1)
        step = {"input_ids": torch.tensor([[7]]), "attention_mask": mask, "past_key_values": cache}
        return time_call(lambda: prefill(model, step), model_device(model))

    return call


def say(line: str) -> None:
    """A line of the table."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark; returns the path of its record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="576 visual tokens only, few rounds")
    parser.add_argument("--layers", type=int, default=32, help="decoder layers")
    parser.add_argument("--hidden", type=int, default=512, help="width of the decoder, a multiple of 64")
    parser.add_argument("--output", type=Path, default=Path("results/bench"), help="folder of the record")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    started, load = time.time(), os.getloadavg()
    model = build(options.layers, options.hidden, options.hidden // 64, options.hidden * 43 // 16)
    plan = [(576, 3, 1)] if options.quick else [(576, 10, 3), (2880, 5, 1)]
    prefills = [
        bench_prefill(model, visual, Protocol(f"{visual}", warmup=1, pairs=rounds), selection_rounds)
        for visual, rounds, selection_rounds in plan
    ]
    decoding = bench_decode(model, 576, Protocol("decode", warmup=3, pairs=30 if options.quick else 100))
    record = {
        "format": 1,
        "model": {"layers": options.layers, "hidden": options.hidden, "dtype": "float32", "attention": "sdpa"},
        "threads": torch.get_num_threads(),
        "load_before_and_after": [load, os.getloadavg()],
        "seconds": time.time() - started,
        "prefill": prefills,
        "decode": decoding,
        "official_cpu_ratios": OFFICIAL,
        "environment": environment(),
    }
    path = options.output / f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(started))}.json"
    write_atomically(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
    say(f"\nrecord: {path}   ({record['seconds']:.0f} s, load {load[0]:.1f} before)")
    return path


if __name__ == "__main__":
    main()
