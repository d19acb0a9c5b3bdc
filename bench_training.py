"""How fast a training step with dropping is, as a ratio to one without, held against the FLOPs it saves.

    make bench-training     (about 5 minutes on one core; `python bench_training.py --quick`: about 1 minute)

A random LLaVA (12 layers, width 384, 6 heads, MLP 1032, float32, one thread), the decoder alone, batches of two records
of 576 visual tokens + 64 of text with four answers each; a step is forward, backward and AdamW over all weights. The
lanes:

    plain           rows of one length
    checkpointing   the same, every layer run again in the backward pass (gradient_checkpointing=true)
    ragged          rows of 64 and 40 tokens of text: padding, hence masks

`CPU` is the time of a step / that of the unpruned model's, in turns; median of the paired ratios, 95 % interval.
`FLOPs` is the same ratio in closed form (pdrop/training_flops.py: attention as full squares), `causal` with the half of
them that causal kernels compute. `none again` is the unpruned model against itself: the noise. Goal: CPU at most 5 %
above FLOPs.
The record goes to results/bench/.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import Case, build, compare, cpu_ms, say
from pdrop.engine import attach
from pdrop.environment import environment
from pdrop.latency import ClockedAttachment, Protocol, Sample, model_device, take_turns, time_call
from pdrop.methods.fastv import FastV
from pdrop.methods.pyramiddrop import PyramidDrop
from pdrop.record import write_atomically
from pdrop.schedule import pyramid, single
from pdrop.sizes import Architecture
from pdrop.training.parts import checkpoint_activations
from pdrop.training_flops import training_step_flops

VISUAL, TEXT, ANSWERS, IMAGE_TOKEN = 576, 64, 4, 999
LAYERS = 12
LANES = ("plain", "checkpointing", "ragged")
CASES = (
    Case("PyramidDrop S=4 .5", PyramidDrop(), pyramid(LAYERS)),
    Case("FastV K=2 .5", FastV(), single(2, 0.5)),
    Case("keep = 1", PyramidDrop(), pyramid(LAYERS, ratio=1.0)),
)


def batch(text: Sequence[int]) -> dict[str, torch.Tensor]:
    """Rows of 576 visual tokens and so many of text, padded on the right; ANSWERS answers of 4 tokens each."""
    longest = VISUAL + max(text)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 900, (len(text), longest), generator=generator)
    mask, labels = torch.ones_like(ids), torch.full_like(ids, -100)
    for row, words in enumerate(text):
        ids[row, 5 : 5 + VISUAL] = IMAGE_TOKEN
        mask[row, VISUAL + words :] = 0
        turn = (words - 5) // ANSWERS
        for answer in range(ANSWERS):
            end = VISUAL + 5 + turn * (answer + 1)
            labels[row, end - 4 : end] = ids[row, end - 4 : end]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Steps:
    """Training steps of one model; every side goes on from where the other left the weights: time does not care."""

    def __init__(self, model: Any, inputs: dict[str, torch.Tensor]) -> None:
        self.model, self.inputs = model.train(), inputs
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def step(self) -> None:
        """Forward, backward, update."""
        self.model(**self.inputs, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def side(self, case: Case | None) -> Callable[[], Sample]:
        """A step under a case, timed; None: nothing attached."""

        def call() -> Sample:
            if case is None:
                return time_call(self.step, model_device(self.model))
            with attach(self.model, case.method, case.schedule):
                return time_call(self.step, model_device(self.model))

        return call

    def selection_share(self, case: Case) -> float:
        """Share of a step inside the attached hooks: reading the batch, ranking, gathering, masks."""
        with (attachment := ClockedAttachment(self.model, case.method, case.schedule)):
            begin = attachment.now()
            self.step()
            return attachment.spent / (attachment.now() - begin)


def flops_ratio(case: Case, arch: Architecture, text: int, checkpointing: bool, causal: bool) -> float:
    """FLOPs of a step under the case / of one without. Every row is as long as the padded batch."""
    common: dict[str, Any] = {"images": 0, "checkpointing": checkpointing, "causal": causal}
    layers = case.schedule.tokens_per_layer(VISUAL, arch.layers, case.method.count)
    boundaries = case.schedule.layers if case.method.ranks_by_attention else ()
    asking = ANSWERS if case.method.ranks_by_attention else 1
    this = training_step_flops(arch, layers, text, boundaries=boundaries, asking=asking, **common)
    return this["total"] / training_step_flops(arch, [VISUAL] * arch.layers, text, **common)["total"]


def bench_lane(lane: str, rounds: int, compared: Sequence[Case]) -> dict[str, Any]:
    """One lane, as it goes into the record; prints its table."""
    text = (TEXT, 40) if lane == "ragged" else (TEXT, TEXT)
    model, checkpointing = build(LAYERS, 384, 6, 1032), lane == "checkpointing"
    if checkpointing:
        checkpoint_activations(model)
    for name, weight in model.named_parameters():
        weight.requires_grad_("language_model" in name or "lm_head" in name)
    arch, steps = Architecture.from_config(model.config), Steps(model, batch(text))
    sides = {"none": steps.side(None), **{case.name: steps.side(case) for case in compared}, "again": steps.side(None)}
    samples = take_turns(sides, Protocol(lane, warmup=1, pairs=rounds))
    say(f"\n{lane}: {cpu_ms(samples['none']).median:.0f} ms a step, unpruned")
    say(" " * 24 + "CPU           [95 %]   wall   FLOPs  off by  causal  off by  selection")
    rows = {}
    for case in compared:
        row, line = compare(case.name, samples[case.name], samples["none"])
        full, causal = (flops_ratio(case, arch, max(text), checkpointing, halved) for halved in (False, True))
        share = steps.selection_share(case)
        rows[case.name] = row | {"schedule": str(case.schedule), "flops_ratio": full, "flops_ratio_causal": causal}
        rows[case.name]["selection_share"] = share
        off, off_causal = (100 * (row["cpu_ratio"]["median"] / flops - 1) for flops in (full, causal))
        say(f"{line}{full:8.3f}{off:+7.1f}%{causal:8.3f}{off_causal:+7.1f}%{100 * share:10.2f}%")
    noise, line = compare("none again: noise", samples["again"], samples["none"])
    say(line)
    return {"lane": lane, "text": list(text), "none_again": noise, "cases": rows}


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark; returns the path of its record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="PyramidDrop alone, few rounds")
    parser.add_argument("--rounds", type=int, default=6, help="steps of each side in a lane")
    parser.add_argument("--output", type=Path, default=Path("results/bench"), help="folder of the record")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    torch.set_num_threads(1)
    started, load = time.time(), os.getloadavg()
    rounds, compared = (3, CASES[:1]) if options.quick else (options.rounds, CASES)
    lanes = [bench_lane(lane, rounds, compared) for lane in LANES]
    record = {
        "format": 1,
        "what": "training step",
        "visual": VISUAL,
        "threads": torch.get_num_threads(),
        "load_before_and_after": [load, os.getloadavg()],
        "seconds": time.time() - started,
        "lanes": lanes,
        "environment": environment(),
    }
    path = options.output / f"training-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(started))}.json"
    write_atomically(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
    say(f"\nrecord: {path}   ({record['seconds']:.0f} s, load {load[0]:.1f} before)")
    return path


if __name__ == "__main__":
    main()
