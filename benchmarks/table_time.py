"""How long a table takes on many GPUs: arithmetic from FLOPs and stated assumptions, nothing measured.

    python -m benchmarks.table_time                      PyramidDrop's Table 1 on 8 H100
    python -m benchmarks.table_time --gpus 64 --utilisation 0.3

PyramidDrop's Table 1 (arXiv 2410.17247): seven benchmarks, LLaVA-NeXT-7B and LLaVA-1.5-7B, each unpruned, with FastV
(K=2, R=50 %) and with PyramidDrop (four stages, lambda 0.5). A batch takes

    prefill      its FLOPs (pdrop/cost/flops.py), by `--utilisation` of the card's dense bfloat16 peak
    decoding     `--steps` forwards of `--step-ms`: a model of 7B reads 14 GB for each, and Python starts its kernels
    pictures     `--picture-ms` of one CPU thread for each crop, as if none were prepared meanwhile (prefetch=0)

Not included: loading (once per worker), scoring (one process), the end of a task, when some workers have no work left.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pdrop.cost.flops import prefill_flops
from pdrop.methods.base import Method
from pdrop.methods.fastv import FastV
from pdrop.methods.pyramiddrop import PyramidDrop
from pdrop.models import shipped
from pdrop.pace import duration
from pdrop.schedule import Schedule, pyramid, single
from pdrop.shapes import ModelSizes

# numbers of questions in lmms-eval's splits, from the benchmarks' papers
QUESTIONS = {"MME": 2374, "ScienceQA-IMG": 2017, "MMBench-CN dev": 4329, "GQA": 12578, "POPE": 9000}
QUESTIONS |= {"TextVQA val": 5000, "SEED-Bench images": 14233}
MODELS = {"llava_next_7b": 5, "llava_1_5_7b": 1}  # crops of a picture
H100 = 989e12  # dense bfloat16 FLOPs per second, NVIDIA's data sheet (SXM)


@dataclass(frozen=True)
class Assumptions:
    """Values that only a measurement could give.

    Attributes:
        utilisation: Share of the peak that a prefill reaches.
        steps: Decoding steps of an answer; these benchmarks want one word or letter.
        step_ms: Time of a decoding step of a whole batch.
        picture_ms: Time of one CPU thread for a crop.
        batch: Questions per batch.
    """

    utilisation: float = 0.4
    steps: int = 5
    step_ms: float = 25.0
    picture_ms: float = 8.0
    batch: int = 8

    def batch_seconds(self, model: str, method: Method | None, schedule: Schedule) -> dict[str, float]:
        """Seconds that an H100 takes for a batch of a model's reference prompts, by part."""
        sizes = ModelSizes.from_config(shipped.read(model))
        prompt = shipped.reference_prompt(model).under(method, schedule, sizes.layers)
        selection = None if method is None else method.selection(schedule, prompt, sizes)
        flops = self.batch * prefill_flops(sizes, prompt, selection)["total"]
        return {
            "prefill": flops / (self.utilisation * H100),
            "decoding": self.steps * self.step_ms / 1e3,
            "pictures": self.batch * MODELS[model] * self.picture_ms / 1e3,
        }


def rows() -> Iterator[tuple[str, str, Method | None, Schedule]]:
    """The table's rows: model, name, method, schedule."""
    for model in MODELS:
        layers = ModelSizes.from_config(shipped.read(model)).layers
        yield model, "none", None, Schedule()
        yield model, "fastv", FastV(), single(layer=2, keep=0.5)
        yield model, "pyramiddrop", PyramidDrop(), pyramid(num_layers=layers, stages=4, ratio=0.5)


def page(assumed: Assumptions, gpus: int) -> str:
    """The arithmetic as text."""
    questions, whole = sum(QUESTIONS.values()), 0.0
    text = [f"{questions} questions per row, batches of {assumed.batch}, {gpus} H100 at {assumed.utilisation:.0%} of"]
    text[0] += f" {H100 / 1e12:.0f} TFLOPs; arithmetic, not measured"
    text.append(f"{'model':14s} {'method':12s} {'prefill':>9s} {'decoding':>9s} {'pictures':>9s} {'GPU hours':>10s}")
    for model, name, method, schedule in rows():
        parts = assumed.batch_seconds(model, method, schedule)
        hours = sum(parts.values()) * questions / assumed.batch / 3600
        whole += hours
        seconds = "".join(f"{value:8.3f}s " for value in parts.values())
        text.append(f"{model:14s} {name:12s} {seconds}{hours:10.2f}")
    text.append(f"all of it: {whole:.1f} GPU hours, {duration(whole / gpus * 3600)} on {gpus}")
    return "\n".join(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the arithmetic of the command line."""
    plain, parser = Assumptions(), argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--utilisation", type=float, default=plain.utilisation)
    parser.add_argument("--steps", type=int, default=plain.steps)
    parser.add_argument("--step-ms", type=float, default=plain.step_ms)
    parser.add_argument("--picture-ms", type=float, default=plain.picture_ms)
    parser.add_argument("--batch", type=int, default=plain.batch)
    given = vars(parser.parse_args(arguments))
    gpus = given.pop("gpus")
    sys.stdout.write(f"{page(Assumptions(**given), gpus)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
