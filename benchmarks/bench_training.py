"""How fast a training step with dropping is, as a ratio to one without, compared with the FLOPs it saves.

    make bench-training     (about 8 minutes on one core; `python -m benchmarks.bench_training --quick`: about 1 minute)
    python -m benchmarks.bench_training --lanes study

A step is forward, backward and AdamW. The lanes:

    plain           rows of one length
    checkpointing   the same, every layer run again in the backward pass (gradient_checkpointing=true)
    ragged          rows of 64 and 40 tokens of text: padding, hence masks
    study           the steps of `make training-study`, interleaved (its trainings run one after another): each of its
                    dials on the embedded model's shapes, with the frozen tower; 24 records of 144 visual tokens and 17
                    of text with one answer

The first three: a random LLaVA (12 layers, width 384, 6 heads, MLP 1032), only the decoder, all of it trained, batches
of two records of 576 visual tokens + 64 of text with four answers each. All in float32 on one thread.

`CPU` is the time of a step / that of the unpruned model's, in turns; median of the paired ratios, 95 % interval.
`FLOPs` is the same ratio in closed form (pdrop/cost/training.py: attention as full squares), `causal` with the half of
them that causal kernels compute. `none again` is the unpruned model against itself: the noise. Goal: CPU at most 5 %
above FLOPs. The record is written to results/bench/.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench import Case, build, compare, cpu_ms, features, say
from benchmarks.in_step import keep_memory
from benchmarks.records import Session
from pdrop.command_help import CommandHelp
from pdrop.cost.training import training_step_flops
from pdrop.embedded.model import build as build_embedded
from pdrop.engine import attach
from pdrop.methods.fastv import FastV
from pdrop.methods.pyramiddrop import PyramidDrop
from pdrop.schedule import pyramid, single
from pdrop.shapes import ModelSizes, PromptSize
from pdrop.timing.clock import ClockedAttachment, Timed, model_device, time_call
from pdrop.timing.paired import take_turns
from pdrop.timing.protocol import TimingProtocol
from pdrop.training.parts import checkpoint_activations

LAYERS = 12


@dataclass(frozen=True)
class Lane:
    """One table of the benchmark: its cases, and the prompts of a step."""

    name: str
    cases: tuple[Case, ...]
    text: tuple[int, ...] = (64, 64)  # tokens of text in each row
    visual: int = 576
    answers: int = 4
    checkpointing: bool = False
    embedded: bool = False  # the embedded model's shapes with its tower, not only a decoder

    def build(self) -> Any:
        """The model with random weights; those that a step does not train are frozen."""
        model = build_embedded() if self.embedded else build(LAYERS, 384, 6, 1032)
        if self.checkpointing:
            checkpoint_activations(model)
        for name, weight in model.named_parameters():
            trained = "language_model" in name or "lm_head" in name
            weight.requires_grad_(trained or (self.embedded and "multi_modal_projector" in name))
        return model.train()

    def batch(self, model: Any) -> dict[str, Any]:
        """Rows of visual tokens and text, padded on the right; answers of 4 tokens each, a single answer of 2."""
        rows, longest, generator = len(self.text), self.visual + max(self.text), torch.Generator().manual_seed(0)
        image, length = model.config.image_token_id, 4 if self.answers > 1 else 2
        words = torch.tensor([word for word in range(3, model.config.text_config.vocab_size) if word != image])
        ids = words[torch.randint(len(words), (rows, longest), generator=generator)]
        mask, labels = torch.ones_like(ids), torch.full_like(ids, -100)
        for row, number in enumerate(self.text):
            ids[row, 5 : 5 + self.visual] = image
            mask[row, self.visual + number :] = 0
            turn = (number - 5) // self.answers
            for answer in range(self.answers):
                end = self.visual + 5 + turn * (answer + 1)
                labels[row, end - length : end] = ids[row, end - length : end]
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if self.embedded:
            side = model.config.vision_config.image_size
            inputs["pixel_values"] = torch.randn(rows, 3, side, side, generator=generator)
            return inputs
        return inputs | features(model, [self.visual] * rows)

    def flops_ratio(self, case: Case, sizes: ModelSizes, causal: bool) -> float:
        """FLOPs of a step with the case / of one without. Every row counts at the padded batch's length."""
        common: dict[str, Any] = {"checkpointing": self.checkpointing, "causal": causal}
        whole = PromptSize(max(self.text), self.visual, images=None if self.embedded else 0)
        prompt = whole.under(case.method, case.schedule, sizes.layers)
        selection = replace(case.method.selection(case.schedule, prompt, sizes), query_rows=self.answers)
        this = training_step_flops(sizes, prompt, selection, **common)
        return this["total"] / training_step_flops(sizes, prompt.undropped(), **common)["total"]


PYRAMIDDROP, FASTV = (
    Case("PyramidDrop S=4 .5", PyramidDrop(), pyramid(LAYERS)),
    Case("FastV K=2 .5", FastV(), single(2, 0.5)),
)
CASES = (PYRAMIDDROP, FASTV, Case("keep = 1", PyramidDrop(), pyramid(LAYERS, ratio=1.0)))
STUDY = (
    PYRAMIDDROP,
    FASTV,
    *(Case(f"PyramidDrop S=4 .{n}", PyramidDrop(), pyramid(LAYERS, ratio=n / 10)) for n in (4, 6)),
    *(Case(f"PyramidDrop S={n} .5", PyramidDrop(), pyramid(LAYERS, stages=n)) for n in (3, 5)),
)
LANES = (
    Lane("plain", CASES),
    Lane("checkpointing", CASES, checkpointing=True),
    Lane("ragged", CASES, text=(64, 40)),
    Lane("study", STUDY, text=(17,) * 24, visual=144, answers=1, embedded=True),
)


class TrainingSteps:
    """Training steps of one model; each side continues with the weights that the other left, as time does not depend
    on them."""

    def __init__(self, model: Any, inputs: dict[str, Any]) -> None:
        self.model, self.inputs = model, inputs
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def step(self) -> None:
        self.model(**self.inputs, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def side(self, case: Case | None) -> Callable[[], Timed]:
        """A timed step with a case attached; None: nothing attached."""

        def call() -> Timed:
            if case is None:
                return time_call(self.step, model_device(self.model))
            with attach(self.model, case.method, case.schedule):
                return time_call(self.step, model_device(self.model))

        return call

    def selection_share(self, case: Case) -> float:
        """Share of a step inside the attached hooks: reading the batch, ranking, gathering, masks."""
        with (attachment := ClockedAttachment(self.model, case.method, case.schedule)):
            begin = attachment.seconds()
            self.step()
            return attachment.spent / (attachment.seconds() - begin)


def bench_lane(lane: Lane, rounds: int, compared: Sequence[Case]) -> dict[str, Any]:
    """One lane, as the record holds it; prints its table."""
    model = lane.build()
    sizes, steps = ModelSizes.from_config(model.config), TrainingSteps(model, lane.batch(model))
    sides = {"none": steps.side(None), **{case.name: steps.side(case) for case in compared}, "again": steps.side(None)}
    samples = take_turns(sides, TimingProtocol(lane.name, warmup=1, pairs=rounds))
    say(f"\n{lane.name}: {cpu_ms(samples['none']).median:.0f} ms per step, unpruned")
    say(" " * 24 + "CPU           [95 %]   wall   FLOPs  off by  causal  off by  selection")
    rows = {}
    for case in compared:
        row, line = compare(case.name, samples[case.name], samples["none"])
        full, causal = (lane.flops_ratio(case, sizes, halved) for halved in (False, True))
        share = steps.selection_share(case)
        rows[case.name] = row | {"schedule": str(case.schedule), "flops_ratio": full, "flops_ratio_causal": causal}
        rows[case.name]["selection_share"] = share
        off, off_causal = (100 * (row["cpu_ratio"]["median"] / flops - 1) for flops in (full, causal))
        say(f"{line}{full:8.3f}{off:+7.1f}%{causal:8.3f}{off_causal:+7.1f}%{100 * share:10.2f}%")
    noise, line = compare("none again: noise", samples["again"], samples["none"])
    say(line)
    return {"lane": lane.name, "visual": lane.visual, "text": list(lane.text), "none_again": noise, "cases": rows}


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark; returns the path of its record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=CommandHelp)
    parser.add_argument("--quick", action="store_true", help="PyramidDrop alone, few rounds")
    names = [lane.name for lane in LANES]
    parser.add_argument("--lanes", nargs="+", choices=names, default=names, metavar="LANE", help="all if not given")
    parser.add_argument("--rounds", type=int, default=6, help="steps of each side in a lane")
    parser.add_argument("--output", type=Path, default=Path("results/bench"), help="folder of the record")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    torch.set_num_threads(1)
    session, keeps = Session(), keep_memory()
    rounds = 3 if options.quick else options.rounds
    lanes = [
        bench_lane(lane, rounds, lane.cases[:1] if options.quick else lane.cases)
        for lane in LANES
        if lane.name in options.lanes
    ]
    record = {
        "format": 2,
        "what": "training step",
        "memory_is_kept": keeps,
        "lanes": lanes,
    }
    path = session.publish(options.output, "training", record)
    say(f"\n{session.said(path)}")
    return path


if __name__ == "__main__":
    main()
