"""How fast dropping is, as ratios to the unpruned model in the same process, compared with the FLOPs it saves.

    make bench                                             (about 20 minutes on one core; with --quick about 1 minute)
    python -m benchmarks.bench --only 'keep = 1' --rounds 60 15         one case more closely; prints, records nothing

A random LLaVA of 32 layers, width 512 (8 heads, MLP 1376), float32, one thread, 576 and 2880 visual tokens + 60 of
text, only the decoder. Weights are random because speed does not depend on them. The columns:

    CPU, wall   time of a prefill / the unpruned model's, a layer at a time in turns (benchmarks/in_step.py); median
                of the paired ratios, its 95 % interval
    FLOPs       the same ratio in closed form (pdrop/cost/flops.py)
    causal      the same with the half of attention's square that sdpa's causal kernels compute
    short       what can be reached, measured in the same rounds: prefills of the unpruned model with prompts as
                short as each stage, weighted by the stage's layers; small matrices take longer per FLOP
    over        CPU / short - 1: what dropping itself costs
    selection   share of the prefill inside the attached hooks: reading the prompt, ranking, gathering, masks

Decoding steps are timed call by call in turns, for their layers are too short to hand over at each. The random twin
has PyramidDrop's schedule and no ranking; `keep = 1` ranks at every boundary and drops nothing; `none again` is the
unpruned model against itself: differences of that size mean nothing. CPU time is the better number on a machine that
others use, too. It does not measure batches, servers or GPUs. The record is written to results/bench/.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from benchmarks.in_step import Side, in_step, keep_memory
from benchmarks.records import Session
from pdrop.command_help import CommandHelp
from pdrop.cost.flops import decode_flops_per_token, prefill_flops
from pdrop.engine import attach
from pdrop.methods.base import Method
from pdrop.methods.fastv import FastV
from pdrop.methods.pyramiddrop import PyramidDrop
from pdrop.methods.random_drop import RandomDrop
from pdrop.methods.sparsevlm import SparseVLM
from pdrop.methods.sparsevlm_schedules import sparsevlm
from pdrop.record import Interval
from pdrop.schedule import Schedule, pyramid, single
from pdrop.shapes import ModelSizes, PromptSize
from pdrop.timing.clock import Timed, model_device, time_call
from pdrop.timing.conditions import conditions
from pdrop.timing.paired import interval, paired_ratio, prefill, selection_share, take_turns
from pdrop.timing.protocol import TimingProtocol

TEXT_TOKENS, IMAGE_TOKEN = 60, 999
# CPU seconds of the official programs / those of an unpruned sdpa model, at these shapes, one thread, float32: measured
# once with PyramidDrop at 6444f30, FastV at d165972 (its code for transformers 4.31, in place, and its fork of 4.39),
# SparseVLM at 26a5f48. Not measured by this program.
OFFICIAL: dict[int, dict[str, dict[str, float]]] = {
    576: {
        "PyramidDrop S=4 .5": {"its program": 0.53},
        "FastV K=2 .5": {"in transformers 4.31": 0.67, "its fork of 4.39": 0.72},
        "SparseVLM-192": {"its program": 0.47},
    },
    2880: {
        "PyramidDrop S=4 .5": {"its program": 0.43},
        "FastV K=2 .5": {"in transformers 4.31": 1.04, "its fork of 4.39": 0.76},
        "SparseVLM-192": {"its program": 0.34},
    },
}


@dataclass(frozen=True)
class Case:
    """A method at its schedule."""

    name: str
    method: Method
    schedule: Schedule

    def flops_ratio(self, sizes: ModelSizes, visual: int, total: str = "total") -> float:
        """FLOPs of the decoder's prefill / the unpruned one's."""
        prompt = self.prompt(visual, sizes.layers)
        selection = self.method.selection(self.schedule, prompt, sizes)
        return prefill_flops(sizes, prompt, selection)[total] / prefill_flops(sizes, prompt.undropped())[total]

    def prompt(self, visual: int, layers: int) -> PromptSize:
        """The tokens that enter the decoder's layers; there is no tower."""
        return PromptSize(TEXT_TOKENS, visual, images=0).under(self.method, self.schedule, layers)

    def lengths(self, visual: int, layers: int) -> list[int]:
        """Tokens in each layer: whole numbers, for one prompt."""
        return [int(length) for length in self.prompt(visual, layers).tokens_per_layer]


def cases(layers: int) -> list[Case]:
    """The cases: the papers' defaults, a random twin, and full ranking with nothing dropped."""
    return [
        Case("PyramidDrop S=4 .5", PyramidDrop(), pyramid(layers)),
        Case("its random twin", RandomDrop(positions="compact"), pyramid(layers)),
        Case("FastV K=2 .5", FastV(), single(2, 0.5)),
        Case("SparseVLM-192", SparseVLM(), sparsevlm(layers, budget=192)),
        Case("keep = 1", PyramidDrop(), pyramid(layers, ratio=1.0)),
    ]


def build(layers: int = 32, hidden: int = 512, heads: int = 8, intermediate: int = 1376) -> Any:
    """A LLaVA with random weights; its tower is tiny and never called."""
    torch.manual_seed(0)
    text = dict(model_type="llama", vocab_size=1000, hidden_size=hidden, intermediate_size=intermediate)
    text |= dict(num_hidden_layers=layers, num_attention_heads=heads, max_position_embeddings=8192)
    tower = dict(model_type="clip_vision_model", hidden_size=16, intermediate_size=16, image_size=28, patch_size=14)
    tower |= dict(num_hidden_layers=1, num_attention_heads=1)
    config = transformers.LlavaConfig(text_config=text, vision_config=tower, image_token_index=IMAGE_TOKEN)
    return transformers.LlavaForConditionalGeneration(config).eval()


def prompt(model: Any, visual: int) -> dict[str, Any]:
    """Ids [1, visual + 60]: half of the text, the image's placeholders, the other half; and features for the image."""
    ids = torch.randint(3, 900, (1, visual + TEXT_TOKENS), generator=torch.Generator().manual_seed(0))
    ids[:, TEXT_TOKENS // 2 : TEXT_TOKENS // 2 + visual] = IMAGE_TOKEN
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **features(model, [visual])}


def features(model: Any, visual: list[int]) -> dict[str, Any]:
    """Random features for images with this many tokens, as a vision tower would make them: only the decoder runs.

    Ids without pixels or features count as text, of which nothing is dropped.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    hidden = model.config.text_config.hidden_size
    made: Any = [torch.zeros(count, hidden, dtype=model.dtype, device=model.device) for count in visual]
    return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=made)}}


def twin(model: Any) -> Any:
    """A model on the same weights: several can be attached to, and have forwards running, at the same time."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def bench_prefill(
    model: Any, visual: int, rounds: int, selection_rounds: int, compared: Sequence[Case]
) -> dict[str, Any]:
    """All results for one prompt size, as the record holds them; prints their table."""
    sizes = ModelSizes.from_config(model.config)
    inputs = prompt(model, visual)
    with contextlib.ExitStack() as attachments:
        models = {name: twin(model) for name in ("none", *(case.name for case in compared))}
        for case in compared:
            attachments.enter_context(attach(models[case.name], case.method, case.schedule))
        sides = {name: Side(own, partial(prefill, own, inputs)) for name, own in models.items()}
        # the whole prompt's is the unpruned model again
        for length in sorted({length for case in compared for length in case.lengths(visual, sizes.layers)}):
            own = twin(model)
            sides[tokens(length)] = Side(own, partial(prefill, own, prompt(own, length - TEXT_TOKENS)))
        samples = in_step(sides, rounds)
    say(f"\n{visual} visual + {TEXT_TOKENS} text tokens: {cpu_ms(samples['none']).median:.0f} ms a prefill, unpruned")
    say(" " * 24 + "CPU           [95 %]   wall   FLOPs  causal   short    over  selection")
    rows = {}
    for case in compared:
        row, line = compare(case.name, samples[case.name], samples["none"])
        full, causal = (case.flops_ratio(sizes, visual, total) for total in ("total", "total_causal"))
        share = median(selection_share(model, inputs, case.method, case.schedule) for _ in range(selection_rounds))
        row |= {"method": repr(case.method), "schedule": str(case.schedule), "selection_share": share}
        short = shortened(samples, case.lengths(visual, sizes.layers))
        over = paired_ratio([sample.cpu_ms for sample in samples[case.name]], short)
        row |= {"short_ratio": asdict(paired_ratio(short, [sample.cpu_ms for sample in samples["none"]]))}
        rows[case.name] = row | {"over_short": asdict(over), "flops_ratio": full, "flops_ratio_causal": causal}
        say(f"{line}{full:8.3f}{causal:8.3f}{row['short_ratio']['median']:8.3f}{100 * over.median - 100:+7.1f}%"
            f"{100 * share:10.2f}%")  # fmt: skip
    noise, line = compare("none again: noise", samples[tokens(visual + TEXT_TOKENS)], samples["none"])
    say(line)
    by_name = {case.name: [sample.cpu_ms for sample in samples[case.name]] for case in compared}
    ranking = None
    if {"PyramidDrop S=4 .5", "its random twin"} <= by_name.keys():
        first, second = by_name["PyramidDrop S=4 .5"], by_name["its random twin"]
        ranking = interval([(a - b) / a for a, b in zip(first, second)], "share")
        say(f"PyramidDrop less its random twin: {100 * ranking.median:+.2f} % of its prefill")
    for name, programs in OFFICIAL[visual].items() if len(compared) > 1 else ():
        say(f"official {name}, same shapes, not measured here: "
            + ", ".join(f"{ratio:.2f} ({which})" for which, ratio in programs.items()))  # fmt: skip
    none = {"cpu_ms": asdict(cpu_ms(samples["none"])), "again": noise}
    return {
        "visual": visual,
        "text": TEXT_TOKENS,
        "none": none,
        "cases": rows,
        "ranking_by_twin": ranking and asdict(ranking),
    }


def tokens(length: int) -> str:
    """The name of the unpruned model with a prompt of this length."""
    return f"{length} tokens"


def shortened(samples: dict[str, list[Timed]], lengths: Sequence[int]) -> list[float]:
    """CPU milliseconds of a prefill whose layers see `lengths` tokens and where nothing is dropped, for each round."""
    whole = [[sample.cpu_ms for sample in samples[tokens(length)]] for length in lengths]
    return [sum(layers) / len(lengths) for layers in zip(*whole)]


def cpu_ms(samples: Sequence[Timed]) -> Interval:
    """CPU milliseconds of a call."""
    return interval([sample.cpu_ms for sample in samples], "ms")


def compare(name: str, this: Sequence[Timed], base: Sequence[Timed]) -> tuple[dict[str, Any], str]:
    """One side against the unpruned one: its entry in the record, and the start of its line in the table."""
    cpu = paired_ratio([sample.cpu_ms for sample in this], [sample.cpu_ms for sample in base])
    wall = paired_ratio([sample.wall_ms for sample in this], [sample.wall_ms for sample in base])
    row = {"cpu_ms": asdict(cpu_ms(this)), "cpu_ratio": asdict(cpu), "wall_ratio": asdict(wall)}
    return row, f"{name:20}{cpu.median:7.3f}   [{cpu.low:.3f}, {cpu.high:.3f}]{wall.median:7.3f}"


def bench_decode(model: Any, visual: int, protocol: TimingProtocol) -> dict[str, Any]:
    """Steps of one token on the caches that the prefills leave, interleaved; each side has its own attached model."""
    sizes, layers = ModelSizes.from_config(model.config), len(model.get_decoder().layers)
    compared = [
        Case("none", PyramidDrop(), Schedule()),
        Case("PyramidDrop compact", PyramidDrop(positions="compact"), pyramid(layers)),
        Case("PyramidDrop original", PyramidDrop(positions="original"), pyramid(layers)),
        Case("FastV", FastV(), single(2, 0.5)),
        Case("SparseVLM-192", SparseVLM(), sparsevlm(layers, budget=192)),
    ]
    with contextlib.ExitStack() as attachments:
        sides = {}
        for case in compared:
            own = twin(model)  # all of them stay attached while they take turns
            if case.schedule:
                attachments.enter_context(attach(own, case.method, case.schedule))
            sides[case.name] = decoding_side(own, visual)
        samples = take_turns(sides, protocol)
    say(f"\na decoding step after {visual} + {TEXT_TOKENS} tokens: {cpu_ms(samples['none']).median:.1f} ms, unpruned")
    whole, rows = decode_flops_per_token(sizes, [visual + TEXT_TOKENS + 1] * layers), {}
    for case in compared[1:]:
        row, line = compare(case.name, samples[case.name], samples["none"])
        left = [n + 1 for n in case.lengths(visual, layers)]
        rows[case.name] = row | {"flops_ratio": decode_flops_per_token(sizes, left) / whole}
        say(f"{line}{rows[case.name]['flops_ratio']:8.3f}")
    return {"visual": visual, "none": {"cpu_ms": asdict(cpu_ms(samples["none"]))}, "cases": rows}


def decoding_side(model: Any, visual: int) -> Callable[[], Timed]:
    """Prefill now; each call then decodes one more token, as `generate` does: with the mask of the whole prompt."""
    inputs = prompt(model, visual)
    cache = prefill(model, inputs).past_key_values
    mask = inputs["attention_mask"]

    def call() -> Timed:
        nonlocal mask
        mask = torch.cat([mask, mask[:, :1]], 1)
        step = {"input_ids": torch.tensor([[7]]), "attention_mask": mask, "past_key_values": cache}
        return time_call(lambda: prefill(model, step), model_device(model))

    return call


def say(line: str) -> None:
    """A line of the table."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> Path | None:
    """Run the benchmark; returns the path of its record, if it was whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=CommandHelp)
    parser.add_argument("--quick", action="store_true", help="576 visual tokens only, few rounds")
    parser.add_argument("--only", nargs="+", help="prefills of these cases alone (beginnings of names); no record")
    parser.add_argument("--rounds", type=int, nargs=2, help="rounds at 576 and at 2880 visual tokens, with --only")
    parser.add_argument("--output", type=Path, default=Path("results/bench"), help="folder of the record")
    options = parser.parse_args(arguments)
    if options.rounds and (not options.only or min(options.rounds) < 1):
        parser.error("--rounds takes two numbers of at least 1, and goes with --only")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    torch.set_num_threads(1)
    session, keeps = Session(), keep_memory()
    if not keeps:
        say("this system's allocator gives memory back and cannot be told to keep it: expect more noise")
    model = build()
    plan = [(576, 3, 1)] if options.quick else [(576, 20, 5), (2880, 10, 3)]
    compared = cases(len(model.get_decoder().layers))
    if options.only:
        compared = [case for case in compared if case.name.startswith(tuple(options.only))]
        if not compared:
            parser.error(f"--only {' '.join(options.only)}: no such case; there are "
                         + ", ".join(case.name for case in cases(len(model.get_decoder().layers))))  # fmt: skip
        plan = [(visual, rounds, many) for (visual, _, many), rounds in zip(plan, options.rounds or [20, 10])]
    prefills = [bench_prefill(model, *sizes, compared) for sizes in plan]
    if options.only:
        return None
    decoding = bench_decode(model, 576, TimingProtocol("decode", warmup=3, pairs=30 if options.quick else 100))
    record = {
        "format": 3,
        "model": model.config.text_config.to_diff_dict() | {"attention": model.config._attn_implementation},
        "conditions": conditions(model),
        "memory_is_kept": keeps,
        "prefill": prefills,
        "decode": decoding,
        "official_cpu_ratios": {str(visual): programs for visual, programs in OFFICIAL.items()},
    }
    path = session.publish(options.output, "", record)
    say(f"\n{session.said(path)}")
    say(f"as a page: python -m analysis bench --results {options.output.parent}")
    return path


if __name__ == "__main__":
    main()
