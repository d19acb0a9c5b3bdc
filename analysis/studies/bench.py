"""The benchmark's record as a page: what the methods' prefill and decoding take, next to FLOPs and official programs.

python -m analysis bench                    results/tables/bench.md, from the newest record of results/bench; and
                                            bench_choosing.md, from the newest of make bench-choosing
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..grid import DASH, Grid, Text
from ..neutral import in_page

READING = """How to read it: **CPU** is the CPU time of a prefill / the unpruned one's, all in one process and in step:
each runs a layer, then the next one has its turn, so that what slows the machine slows all (decoding steps take turns
call by call); median of the paired ratios and its 95 % interval. **wall** is the same by the clock. **FLOPs** is the
closed form with attention as full squares, **causal** with the half that causal kernels compute: where attention is a
large share, the unpruned model already saves that half. **short** is measured, too: the unpruned model with prompts as
short as each stage, weighted by the stage's layers. It is what this processor can reach, for small matrices take longer
per FLOP. **over** is CPU / short: what dropping itself costs. **selection** is the share of the prefill inside the
hooks. `keep = 1` ranks at every boundary and drops nothing; differences as small as that of the unpruned model to
itself mean nothing. **official** are the methods' published programs at the same shapes, measured once and not by this
program: call by call in turns, with memory that goes back to the system; such a ratio may be off by .05.

What it cannot tell: batches, prompts of other sizes, servers that share a forward among users, GPUs (where small
layers are bound by launching kernels, and attention by memory), other processors and numbers of threads.
"""


CHOOSING = """How to read it: **hooks** is the CPU time inside the hooks of an attached method (reading the prompt,
ranking, merging, gathering rows, making masks) / that of an unpruned prefill of the decoder; **twin** the same under
the random twin, which lets as many tokens stay and ranks nothing; **choosing** the difference, median and half the
interquartile range over the rounds: what ranking and merging take. A negative one is noise. **FLOPs** is the closed
form, at this shape and at LLaVA-1.5-7B's, / the undropped prefill's: the 7B model is eight times as wide, so what grows
with tokens alone weighs an eighth there. Before the decoder 64 of 576 tokens stay, inside it each has its own schedule.
CDPruner, which needs a folder, has the kernel and the greedy choice of `cdpruner_embeddings`, and a text tower. Stages
that find their numbers in the forward are not here.
"""


def pages(results: Path) -> dict[str, str]:
    """The pages of the newest records of a results folder, by name: of prefills and decoding, and of choosing.

    Raises:
        ValueError: If there is no record, or one is not of this version.
    """
    # the names of trainings' records begin otherwise
    found = {
        "bench": sorted((results / "bench").glob("[0-9]*.json")),
        "bench_choosing": sorted((results / "bench").glob("choosing-*.json")),
    }
    if not any(found.values()):
        raise ValueError(f"no benchmark record under {results / 'bench'}: make bench writes one")
    makes = {"bench": page, "bench_choosing": choosing_page}
    return {name: makes[name](records[-1]) for name, records in found.items() if records}


def read(path: Path, written: int) -> dict[str, Any]:
    """A record of the version `written`.

    Raises:
        ValueError: If the file is not such a record.
    """
    try:
        record = json.loads(path.read_text(encoding="utf8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): move it away, or make bench writes a new one") from error
    if not isinstance(record, dict) or record.get("format") != written:
        raise ValueError(f"{path} is not a benchmark record that this version reads: make bench writes a new one")
    return record


def circumstances(record: dict[str, Any], path: Path) -> str:
    """A sentence that says what was measured on which machine."""
    model, made = record["model"], record["environment"]
    loads = [f"{load[0]:.1f}" for load in record["load_before_and_after"]]
    return (
        f"A random LLaVA of {model['num_hidden_layers']} layers, width {model['hidden_size']}, decoder alone, "
        f"{record['conditions']['dtype']}, {model['attention']} attention, {record['threads']} thread"
        f"{'s' if record['threads'] > 1 else ''}; {made['processor']}, load {' and '.join(loads)} before and after; "
        f"commit {str(made.get('git_commit'))[:10]}{' + uncommitted changes' if made.get('git_dirty') else ''}, "
        f"torch {made['packages']['torch']}, transformers {made['packages']['transformers']}; `{path.name}`.\n"
    )


def choosing_page(path: Path) -> str:
    """Markdown of one record of what choosing costs.

    Raises:
        ValueError: If the file is not a record of this version.
    """
    record = read(path, 1)
    whole, rounds = record["unpruned_cpu_s"]["median"], len(record["unpruned_cpu_s"]["values"])
    title = f"Choosing: % of the {1000 * whole:.0f} ms of CPU that an unpruned prefill takes, {rounds} rounds"
    grid = Grid(title, ["", "schedule", "hooks", "twin", "choosing", "FLOPs", "of LLaVA-1.5-7B"], left=2)
    for name, row in record["methods"].items():
        shown = row["schedule"].removeprefix("Schedule('").removesuffix("')")
        shown = shown if len(shown) <= 40 else f"{shown.split()[0]} … {shown.split()[-1]}"
        hooks, twin, choosing = (row[part] for part in ("hooks", "twin", "choosing"))
        cells = [name, shown, f"{100 * hooks['median']:.2f}", f"{100 * twin['median']:.2f}"]
        cells += [f"{100 * choosing['median']:.2f} ± {50 * choosing['iqr']:.2f}"]
        cells += [f"{100 * row['flops']:.2f}", f"{100 * row['flops_llava_1_5_7b']:.2f}"]
        grid.rows.append([*map(Text, cells)])
    return in_page("\n".join(["# bench_choosing\n", circumstances(record, path), grid.titled(), CHOOSING]))


def page(path: Path) -> str:
    """Markdown of one record.

    Raises:
        ValueError: If the file is not a record of this version.
    """
    record = read(path, 3)
    lines = ["# bench\n", circumstances(record, path)]
    for prefill in record["prefill"]:
        lines += [prefill_grid(prefill, record["official_cpu_ratios"].get(str(prefill["visual"]), {})).titled()]
    lines += [decode_grid(record["decode"]).titled(), READING]
    return in_page("\n".join(lines))


def prefill_grid(prefill: dict[str, Any], official: dict[str, dict[str, float]]) -> Grid:
    """Times of one prompt size, one row per method."""
    head = ["", "CPU [95 %]", "wall", "FLOPs", "causal", "short", "over [95 %]", "selection", "official"]
    title = f"Prefill, {prefill['visual']} visual + {prefill['text']} text tokens"
    grid = Grid(f"{title}: {prefill['none']['cpu_ms']['median']:.0f} ms unpruned", head, left=1)
    for name, row in prefill["cases"].items():
        cells = [name, ratio(row["cpu_ratio"]), f"{row['wall_ratio']['median']:.3f}"]
        cells += [f"{row[flops]:.3f}" for flops in ("flops_ratio", "flops_ratio_causal")]
        cells += [f"{row['short_ratio']['median']:.3f}", ratio(row["over_short"])]
        programs = ", ".join(f"{value:.2f} ({which})" for which, value in official.get(name, {}).items())
        grid.rows.append([*map(Text, [*cells, f"{100 * row['selection_share']:.1f} %", programs or DASH])])
    again = prefill["none"]["again"]
    blank = [DASH] * 6
    cells = ["unpruned again: noise", ratio(again["cpu_ratio"]), f"{again['wall_ratio']['median']:.3f}", *blank]
    grid.rows.append([*map(Text, cells)])
    return grid


def decode_grid(decode: dict[str, Any]) -> Grid:
    """Times of a decoding step on the caches that the prefills leave, one row per method."""
    title = f"A decoding step after {decode['visual']} visual tokens"
    grid = Grid(
        f"{title}: {decode['none']['cpu_ms']['median']:.1f} ms unpruned", ["", "CPU [95 %]", "wall", "FLOPs"], left=1
    )
    for name, row in decode["cases"].items():
        cells = [name, ratio(row["cpu_ratio"]), f"{row['wall_ratio']['median']:.3f}", f"{row['flops_ratio']:.3f}"]
        grid.rows.append([*map(Text, cells)])
    return grid


def ratio(interval: dict[str, Any]) -> str:
    """A ratio with its interval."""
    return f"{interval['median']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"
