"""What choosing tokens costs, for every method of conf/method/: CPU time relative to an unpruned prefill, and FLOPs.

    make bench-choosing     (about 4 minutes on one core)

The shape is that of benchmarks/bench.py: a random LLaVA of 32 layers, width 512, float32, one thread, 576 visual tokens
and 60 of text. Its tower has CLIP-L's 24 x 24 patches, an eighth of its width (as the decoder has an eighth of
LLaVA-1.5-7B's) and three layers, of which methods read one or two. Interleaved: a prefill of only the decoder, and one
with each method and with its random twin, whose hooks are timed.

    hooks       CPU time inside the attached hooks (reading the prompt, ranking, merging, gathering, masks) / that of an
                unpruned prefill of the decoder, median of the rounds
    twin        the same under the random twin: as many tokens in every layer, and no ranking
    choosing    the difference, with the spread over rounds: what ranking and merging take
    FLOPs       the same in closed form, at this shape and at LLaVA-1.5-7B's, / the undropped prefill's

Before the decoder 64 tokens stay; inside it each method has its own schedule. The record is written to results/bench/.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.bench import IMAGE_TOKEN, TEXT_TOKENS, features, say
from benchmarks.in_step import keep_memory
from benchmarks.records import Session
from pdrop.cli.compose import choices, choose
from pdrop.command_help import CommandHelp
from pdrop.cost.flops import prefill_flops
from pdrop.methods.base import Method
from pdrop.methods.random_drop import RandomDrop, twin_of
from pdrop.models import shipped
from pdrop.schedule import Schedule
from pdrop.shapes import ModelSizes, PromptSize
from pdrop.timing.clock import ClockedAttachment
from pdrop.timing.conditions import conditions
from pdrop.timing.paired import interval, prefill

VISUAL, SIDE, LAYERS = 576, 24, 32
OTHERS = {"none", "no_image", "downsample", "random", "random_fastv"}  # nothing is chosen, or at random
NEEDS_A_FOLDER = {"cdpruner"}


@dataclass(frozen=True)
class Chosen:
    """A method at its schedule."""

    name: str
    method: Method
    schedule: Schedule

    def flops(self, sizes: ModelSizes, images: int) -> float:
        """FLOPs of choosing / those of the undropped prefill: of only the decoder (`images` 0), or with the tower."""
        prompt = PromptSize(TEXT_TOKENS, VISUAL, images=1).under(self.method, self.schedule, sizes.layers)
        whole = prefill_flops(sizes, replace(prompt, images=images).undropped())["total"]
        return prefill_flops(sizes, prompt, self.method.selection(self.schedule, prompt, sizes))["ranking"] / whole


def compared() -> list[Chosen]:
    """Every method of conf/method/ that ranks: 64 tokens before the decoder, or its own schedule inside it."""
    found = []
    for name in choices("method"):
        if name in OTHERS | NEEDS_A_FOLDER:
            continue
        method, schedule_for = choose(name, {})
        assert method is not None
        schedule = schedule_for(LAYERS)
        if schedule.layers == (0,):
            method, schedule_for = choose(name, {"ratio": 0.111112})
            schedule = schedule_for(LAYERS)
        if not any(stage.adaptive for stage in schedule):  # those find their numbers of tokens in the forward
            assert method is not None
            found.append(Chosen(name, method, schedule))
    return found


def build() -> Any:
    """The benchmark's decoder with a tower in proportion."""
    torch.manual_seed(0)
    text = dict(model_type="llama", vocab_size=1000, hidden_size=512, intermediate_size=1376)
    text |= dict(num_hidden_layers=LAYERS, num_attention_heads=8, max_position_embeddings=8192)
    tower = dict(model_type="clip_vision_model", hidden_size=128, intermediate_size=512, num_hidden_layers=3)
    tower |= dict(num_attention_heads=2, image_size=14 * SIDE, patch_size=14)
    config = transformers.LlavaConfig(
        text_config=text, vision_config=tower, image_token_index=IMAGE_TOKEN, image_seq_length=VISUAL
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def hooks(model: Any, inputs: dict[str, Any], method: Method, schedule: Schedule) -> float:
    """CPU seconds inside the hooks of one prefill."""
    with (attachment := ClockedAttachment(model, method, schedule)):
        prefill(model, inputs)
    return attachment.spent


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run it; returns the path of its record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=CommandHelp)
    parser.add_argument("--rounds", type=int, default=5, help="how often each method has its turn")
    parser.add_argument("--method", action="append", help="only this one; more than once for several")
    parser.add_argument("--output", type=Path, default=Path("results/bench"), help="folder of the record")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    session, keeps = Session(), keep_memory()
    model, generator = build(), torch.Generator().manual_seed(0)
    ids = torch.randint(3, 900, (1, VISUAL + TEXT_TOKENS), generator=generator)
    ids[:, TEXT_TOKENS // 2 : TEXT_TOKENS // 2 + VISUAL] = IMAGE_TOKEN
    words = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    seen = words | {"pixel_values": torch.randn(1, 3, 14 * SIDE, 14 * SIDE, generator=generator)}
    rows = [row for row in compared() if not options.method or row.name in options.method]
    twins: dict[str, RandomDrop] = {row.name: twin_of(row.method) for row in rows}
    spent: dict[str, list[float]] = {row.name: [] for row in rows}
    by_lot: dict[str, list[float]] = {row.name: [] for row in rows}
    whole: list[float] = []
    for turn in range(options.rounds + 1):  # the first is for warming up
        base = time.process_time()
        prefill(model, words | features(model, [VISUAL]))
        base = time.process_time() - base
        for row in rows:
            this = hooks(model, seen, row.method, row.schedule)
            other = hooks(model, seen, twins[row.name], row.schedule)
            if turn:
                spent[row.name].append(this / base)
                by_lot[row.name].append(other / base)
        if turn:
            whole.append(base)
    own, seven = ModelSizes.from_config(model.config), ModelSizes.from_config(shipped.read("llava_1_5_7b"))
    say(f"\n{interval(whole, 's').median * 1000:.0f} ms of CPU an unpruned prefill, {options.rounds} rounds")
    say(" " * 24 + "hooks    twin   choosing        FLOPs   of LLaVA-1.5-7B")
    table: dict[str, dict[str, Any]] = {}
    for row in rows:
        pairs = [a - b for a, b in zip(spent[row.name], by_lot[row.name])]
        hooked, twin, choosing = (interval(values, "share") for values in (spent[row.name], by_lot[row.name], pairs))
        flops, of_seven = row.flops(own, 0), row.flops(seven, 1)
        timed = {"hooks": asdict(hooked), "twin": asdict(twin), "choosing": asdict(choosing)}
        counted = {"flops": flops, "flops_llava_1_5_7b": of_seven}
        table[row.name] = {"method": repr(row.method), "schedule": str(row.schedule), **timed, **counted}
        say(
            f"{row.name:22}{100 * hooked.median:6.2f}%{100 * twin.median:7.2f}%{100 * choosing.median:8.2f}% "
            f"±{50 * choosing.iqr:.2f}{100 * flops:9.2f}%{100 * of_seven:9.2f}%"
        )
    record = {
        "format": 1,
        "model": model.config.text_config.to_diff_dict() | {"attention": model.config._attn_implementation},
        "conditions": conditions(model),
        "memory_is_kept": keeps,
        "unpruned_cpu_s": asdict(interval(whole, "s")),
        "methods": table,
    }
    path = session.publish(options.output, "choosing", record)
    say(f"\n{session.said(path)}")
    return path


if __name__ == "__main__":
    main()
    sys.exit(0)
