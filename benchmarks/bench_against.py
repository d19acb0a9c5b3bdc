"""Times this checkout against another, such as the commit before a change: prefill and decoding, interleaved calls.

    git worktree add ../before HEAD~1
    python -m benchmarks.bench_against ../before
    python -m benchmarks.bench_against ../before --visual 576 2880 --rounds 10

Each checkout runs in its own process, with one thread, on the random LLaVA of `make bench`; the two are called one
after the other, and the order changes with each round (ABBA). A line per case has the median of the paired ratios of
CPU time, this / other, with its 95 % interval. For `none` nothing is attached: its distance from 1 is noise. Nothing is
recorded: numbers to keep are made by `make bench`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.bench import say
from pdrop.timing.paired import paired_ratio

HERE = Path(__file__).resolve().parents[1]
# as benchmarks.in_step.keep_memory, for checkouts that are older than it
MEMORY_IS_KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_TOP_PAD_": str(2**28)}
# runs in either checkout, so it only uses names that older ones have, too
CHILD = """
import contextlib, copy, sys
import torch
from benchmarks.bench import build, cases, decoding_side, prompt
from pdrop.engine import attach
from pdrop.timing.clock import model_device, time_call
from pdrop.timing.paired import prefill

torch.set_num_threads(1)
model = build(layers=int(sys.argv[1]), hidden=int(sys.argv[2]))
compared = {case.name: case for case in cases(int(sys.argv[1]))}
steps = {}
print("ready", flush=True)
for line in sys.stdin:
    what, visual, name = line.rstrip().split(" ", 2)
    visual, case = int(visual), compared.get(name)
    if what == "prefill":
        inputs = prompt(model, visual)
        with attach(model, case.method, case.schedule) if case else contextlib.nullcontext():
            timed = time_call(lambda: prefill(model, inputs), model_device(model))
    else:
        if (visual, name) not in steps:  # a model of its own on the same weights: it stays attached
            own = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
            if case:
                attach(own, case.method, case.schedule).__enter__()
            steps[visual, name] = decoding_side(own, visual)
        timed = steps[visual, name]()
    print(timed.cpu_ms, flush=True)
"""


class Checkout:
    """A process in a checkout that makes the calls it is asked for and reports how long they took."""

    def __init__(self, folder: Path, layers: int, hidden: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(layers), str(hidden)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, **MEMORY_IS_KEPT, "PYTHONPATH": str(folder)},
        )
        self.said()

    def said(self) -> str:
        """Its next line.

        Raises:
            RuntimeError: If the process has ended; its message is on the error output.
        """
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"the process in {self.process.args!r} has ended: its error is above")
        return line

    def cpu_ms(self, what: str) -> float:
        """CPU milliseconds of a call."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return float(self.said())


@contextmanager
def both(other: Path, layers: int, hidden: int) -> Iterator[tuple[Checkout, Checkout]]:
    """Start this checkout's process and the other one's."""
    started: list[Checkout] = []
    try:
        started += [Checkout(HERE, layers, hidden)]
        started += [Checkout(other.resolve(), layers, hidden)]
        yield started[0], started[1]
    finally:
        for one in started:
            one.process.terminate()
            one.process.wait()


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, and print a line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="folder of the other checkout")
    parser.add_argument("--visual", nargs="+", type=int, default=[576], help="visual tokens")
    parser.add_argument("--rounds", type=int, default=20, help="pairs of prefills; of steps five times as many")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--only", nargs="+", help="beginnings of the cases' names")
    options = parser.parse_args(arguments)
    if not (options.other / "benchmarks" / "bench.py").is_file():
        parser.error(f"{options.other} is no checkout of pdrop: it has no benchmarks/bench.py")
    names = ["none", "keep = 1", "PyramidDrop S=4 .5", "its random twin", "FastV K=2 .5", "SparseVLM-192"]
    if options.only:
        names = [name for name in names if name.startswith(tuple(options.only))]
    with both(options.other, options.layers, options.hidden) as (this, other):
        for visual in options.visual:
            for what, rounds in (("prefill", options.rounds), ("decode", 5 * options.rounds)):
                for name in names:
                    call = f"{what} {visual} {name}"
                    for side in (this, other):
                        side.cpu_ms(call)
                    times: list[list[float]] = [[], []]
                    for number in range(rounds):
                        for at in (0, 1) if number % 2 == 0 else (1, 0):
                            times[at].append((this, other)[at].cpu_ms(call))
                    found = paired_ratio(*times)
                    say(f"{call:32}{found.median:7.3f}   [{found.low:.3f}, {found.high:.3f}]")


if __name__ == "__main__":
    main()
