"""The benchmark's record as a page: what the methods' prefill and decoding take, beside FLOPs and official programs.

python -m analysis bench                    results/tables/bench.md, from the newest record of results/bench
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..grid import DASH, Grid, Text
from ..neutral import in_page

READING = """How to read it: **CPU** is the process's CPU time of a prefill / the unpruned model's, both in turns in one
process, median of the paired ratios and its 95 % interval; **wall** the same by the clock. **FLOPs** is the closed form
with attention as full squares, **causal** with the half that causal kernels compute: where attention is a large share,
the unpruned model already saves that half, so "causal" is what can be reached. **off by** is CPU against each of them.
**selection** is the share of the prefill inside the hooks. `keep = 1` ranks at every boundary and drops nothing;
differences as small as that of the unpruned model to itself mean nothing. **official** are the methods' published
programs at the same shapes, measured once and not by this program.

What it cannot tell: batches, prompts of other sizes, servers that share a forward among users, GPUs (where small
layers are bound by launching kernels, and attention by memory), other processors and numbers of threads.
"""


def newest(results: Path) -> Path:
    """The newest record of a results folder.

    Raises:
        ValueError: If there is none.
    """
    found = sorted((results / "bench").glob("[0-9]*.json"))  # those of trainings have a name in front
    if not found:
        raise ValueError(f"no benchmark record under {results / 'bench'}: make bench writes one")
    return found[-1]


def page(path: Path) -> str:
    """Markdown of one record.

    Raises:
        ValueError: If the file is not a record of this version.
    """
    try:
        record = json.loads(path.read_text(encoding="utf8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): move it away, or make bench writes a new one") from error
    if not isinstance(record, dict) or record.get("format") != 2:
        raise ValueError(f"{path} is not a benchmark record that this version reads: make bench writes a new one")
    model, made = record["model"], record["environment"]
    loads = [f"{load[0]:.1f}" for load in record["load_before_and_after"]]
    lines = [
        "# bench\n",
        f"A random LLaVA of {model['num_hidden_layers']} layers, width {model['hidden_size']}, decoder alone, "
        f"{record['conditions']['dtype']}, {model['attention']} attention, {record['threads']} thread"
        f"{'s' if record['threads'] > 1 else ''}; {made['processor']}, load {' and '.join(loads)} before and after; "
        f"commit {str(made.get('git_commit'))[:10]}{' + uncommitted changes' if made.get('git_dirty') else ''}, "
        f"torch {made['packages']['torch']}, transformers {made['packages']['transformers']}; `{path.name}`.\n",
    ]
    for prefill in record["prefill"]:
        lines += [prefill_grid(prefill, record["official_cpu_ratios"].get(str(prefill["visual"]), {})).titled()]
    lines += [decode_grid(record["decode"]).titled(), READING]
    return in_page("\n".join(lines))


def prefill_grid(prefill: dict[str, Any], official: dict[str, dict[str, float]]) -> Grid:
    """Times of one prompt size, one row per method."""
    head = ["", "CPU [95 %]", "wall", "FLOPs", "off by", "causal", "off by", "selection", "official"]
    title = f"Prefill, {prefill['visual']} visual + {prefill['text']} text tokens"
    grid = Grid(f"{title}: {prefill['none']['cpu_ms']['median']:.0f} ms unpruned", head, left=1)
    for name, row in prefill["cases"].items():
        cpu = row["cpu_ratio"]["median"]
        cells = [name, ratio(row["cpu_ratio"]), f"{row['wall_ratio']['median']:.3f}"]
        for flops in (row["flops_ratio"], row["flops_ratio_causal"]):
            cells += [f"{flops:.3f}", f"{100 * (cpu / flops - 1):+.1f} %"]
        programs = ", ".join(f"{value:.2f} ({which})" for which, value in official.get(name, {}).items())
        grid.rows.append([*map(Text, [*cells, f"{100 * row['selection_share']:.1f} %", programs or DASH])])
    again = prefill["none"]["again"]
    blank = [DASH] * 6
    cells = ["unpruned again: noise", ratio(again["cpu_ratio"]), f"{again['wall_ratio']['median']:.3f}", *blank]
    grid.rows.append([*map(Text, cells)])
    return grid


def decode_grid(decode: dict[str, Any]) -> Grid:
    """A step of decoding on the caches that the prefills leave."""
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
