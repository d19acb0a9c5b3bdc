"""Results in prose, written from the records of a store: tables, figures and findings.

    python -m analysis readme --results results/reference      # the last step of make reference

Two pages have them: README.md the short form (one ratio, one figure), between <!-- demo --> and <!-- /demo -->;
docs/results.md all of it, between <!-- results --> and <!-- /results -->. The text between the comments is replaced. No
number and no verdict is typed by hand: a sentence takes its numbers from the tables, and its verdict ("not
distinguishable", for example) from their intervals.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pdrop.commands import typed

from ..comparison.against_random import is_random
from ..comparison.comparable import parts, refuse_mixtures
from ..comparison.compare import between, compare
from ..comparison.table_model import Row, Table
from ..grid import Grid
from ..statistics import Estimate
from ..store.load import experiments, load_experiment
from ..studies.attention import attention_studies, stability
from ..studies.redundancy import studies
from ..style import method_name, task_names
from ..tables.table import grids
from ..tables.text import percent, signed
from . import equal_budgets

PAGES = (Path("README.md"), Path("docs/results.md"))
SHORT, LONG = "demo", "results"  # names of the comments around a block
TABLES = (SHORT, "positions", "redundancy", "attention", "matched_budget", "rivals")  # experiments that are described
WHOLE: Any = {"break_long_words": False, "break_on_hyphens": False}
RATIO = "0.5"  # the ratio of the short form and of the sentence on positions
QUARTER = 0.25  # size of the top set whose overlap between layers is described
SHOWN = ("method", "schedule", "tokens", "FLOPs %", "KV %", "average", "Δ none [95 %]")  # columns of the short form
MOST = 8  # rows of the short form
FIGURES = (
    ("demo-tradeoff", "score against cost", "Average score against prefill FLOPs"),
    ("redundancy", "one cut at layer k: what is still needed there", "Average score against the fraction kept"),
    ("attention", "attention on the image, layer by layer", "Share, entropy and concentration of attention"),
)


def marks(name: str) -> tuple[str, str]:
    """The comments before and after a block."""
    return f"<!-- {name} -->", f"<!-- /{name} -->"


def written(page: Path, results: Path, made: dict[str, Table] | None = None) -> str:
    """The text of the page with its results rendered again.

    Args:
        page: README.md, or another page with a pair of comments for results.
        results: The store.
        made: Tables of the store that have been made before, by experiment; tables made for this page are added.

    Raises:
        ValueError: If the page has no such comments, or a table cannot be made.
    """
    text = page.read_text(encoding="utf8")
    place = Path(os.path.relpath(results, page.parent)).as_posix()
    found = [name for name in (SHORT, LONG) if all(mark in text for mark in marks(name))]
    if not found:
        pairs = " or ".join(" ... ".join(marks(name)) for name in (SHORT, LONG))
        raise ValueError(f"{page} has no {pairs}: put them where the results belong")
    made = {} if made is None else made
    for name in found:
        start, end = marks(name)
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = f"{before}{start}\n{(short if name == SHORT else block)(results, place, made)}{end}{after}"
    return text


def short(results: Path, place: str, made: dict[str, Table]) -> str:
    """The results at one ratio as Markdown; `place` is the store's path from the page, `made` as in `written`.

    Raises:
        ValueError: If there is no experiment "demo", or runs cannot be in one table.
    """
    tables = the_tables(results, made, (SHORT, "redundancy"))
    demo = tables[SHORT]
    (name, _, alt), *_ = FIGURES
    drawn = (results / "figures" / f"{name}.png").is_file()
    lines = [
        heading(demo, f" at ratio {RATIO}"),
        "",
        one_ratio(demo).markdown(),
        *([f"![{alt}]({place}/figures/{name}.png)", ""] if drawn else []),
        *said([redundancy(tables.get("redundancy")), fragile(demo)]),
    ]
    return "\n".join(lines) + "\n"


def one_ratio(demo: Table) -> Grid:
    """The demo's rows at one ratio, with those without dropping and without an image; only columns that fit."""
    whole = grids(demo)[0]
    columns = [whole.head.index(name) for name in SHOWN]
    bounds = [not row.drops or row.blind for row in demo.rows] + [True] * (len(whole.rows) - len(demo.rows))
    asked = [row.runs[0].overrides.get("ratio") == RATIO or row.budget == RATIO for row in demo.rows]
    chosen = [number for number, ratio in enumerate(asked) if ratio and not bounds[number]][: MOST - sum(bounds)]
    rows = [row for number, row in enumerate(whole.rows) if bounds[number] or number in chosen]
    return Grid(whole.title, SHOWN, left=2, rows=[[row[column] for column in columns] for row in rows])


def block(results: Path, place: str, made: dict[str, Table]) -> str:
    """All results as Markdown; `place` is the store's path from the page, `made` as in `written`.

    Raises:
        ValueError: If there is no experiment "demo", or runs cannot be in one table.
    """
    tables = the_tables(results, made)
    demo = tables[SHORT]
    found = [redundancy(tables.get("redundancy")), positions(tables.get("positions"), place)]
    found += [fragile(demo), twins(demo), equal_budgets.matched(tables.get("matched_budget"), place)]
    found += [equal_budgets.rivals(tables.get("rivals"), place), attention(tables.get("attention"))]
    lines = [
        heading(demo),
        "",
        grids(demo)[0].markdown(),
        f"Scores by task, certainty, columns: [{place}/tables/demo.md]({place}/tables/demo.md).{hasty(demo)}",
        "",
        *pictures(results, place),
        "What this model shows (95 % intervals in brackets; differences in points of the average over the tasks):",
        "",
        *said(found),
        *(["", *equal_budgets.figure(results, place)] if "rivals" in tables else []),
    ]
    return "\n".join(lines).rstrip("\n") + "\n"


def said(sentences: Sequence[str]) -> list[str]:
    """The sentences that are not empty, as list items."""
    return [textwrap.fill(f"- {text}", 118, subsequent_indent="  ", **WHOLE) for text in sentences if text]


def the_tables(results: Path, made: dict[str, Table], wanted: Sequence[str] = TABLES) -> dict[str, Table]:
    """The tables that the sentences are about, by experiment; `made` as in `written`.

    Raises:
        ValueError: If there is no experiment "demo".
    """
    known = experiments(results)
    if SHORT not in known:
        raise ValueError(f"no experiment demo under {results / 'experiments'}: {typed('run')} -m experiments=demo")
    wanted = [name for name in wanted if name in known]
    made |= {name: the_table(results, name) for name in wanted if name not in made}
    return {name: made[name] for name in wanted}


def the_table(results: Path, name: str) -> Table:
    """An experiment's only table.

    Raises:
        ValueError: If its runs need several tables, or must not share one.
    """
    experiment = load_experiment(results, name)
    found = parts(experiment)
    if len(found) > 1:
        raise ValueError(f"{name} holds several models: the README shows one")
    refuse_mixtures(experiment, found[0].runs, times=found[0].times)
    return compare(found[0], experiment.superseded)


def heading(demo: Table, where: str = "") -> str:
    """The line above the table: model, tasks, questions, seeds."""
    sizes = sorted({task.n for task in demo.tasks.values()})
    seeds = sorted({len(row.runs) for row in demo.rows if is_random(row)})
    asked = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    drawn = "one seed" if seeds in ([], [1]) else f"{seeds[-1]} seeds of random"
    return (
        f"On the embedded model (`make demo`; {len(demo.tasks)} task families, {asked} questions each, {drawn}; "
        '"Random" and "Random (FastV)" drop at\n'
        f"random, at the same layers as PyramidDrop and FastV and as many tokens up to rounding){where}:"
    )


def hasty(table: Table) -> str:
    """A note if times come from only a few rounds; otherwise empty."""
    quick = any(run.record.spec.latency.startswith("quick") for row in table.rows for run in row.runs)
    return " Times are an\nindication (`latency=quick`)." if quick else ""


def pictures(results: Path, place: str) -> list[str]:
    """The figures that exist, side by side in a table."""
    there = [entry for entry in FIGURES if (results / "figures" / f"{entry[0]}.png").is_file()]
    if not there:
        return []
    head = " | ".join(title for _, title, _ in there)
    shown = " | ".join(f"![{alt}]({place}/figures/{name}.png)" for name, _, alt in there)
    return [f"| {head} |", "|" + "---|" * len(there), f"| {shown} |", ""]


def redundancy(table: Table | None) -> str:
    """The sentence on what is lost if no visual token enters layer k or a later one."""
    if table is None:
        return ""
    for study in studies(table):
        cuts = [
            (layer, row.average.delta)
            for (layer, keep), row in sorted(study.ranked.items())
            if keep == 0 and row.average and row.average.delta
        ]
        if len(cuts) > 1:
            values = [change.value for _, change in cuts]
            less = all(a < b for a, b in zip(values, values[1:]))
            head = "Visual tokens matter less the deeper the layer." if less else "What a layer needs of the image."
            told = "; ".join(f"layer {layer} {signed(change)}{verdict(change)}" for layer, change in cuts)
            return f"**{head}** With none of them from layer k on, the average changes by: {told}."
    return ""


def verdict(change: Estimate) -> str:
    """A note if a difference to dropping nothing may be zero; otherwise empty."""
    return "" if change.clear else " (not distinguishable from none)"


def indistinct(change: Estimate) -> str:
    """A note if a difference of two rows may be zero; otherwise empty."""
    return "" if change.clear else ", not distinguishable"


def positions(table: Table | None, place: str) -> str:
    """The sentence on PyramidDrop with renumbered and with original position ids, at one ratio."""
    if table is None:
        return ""
    rows = {row.spec.positions: row for row in table.rows if row.spec.method == "pyramiddrop" and row.budget == RATIO}
    compact, original = rows.get("compact"), rows.get("original")
    ours, theirs = change_of(compact), change_of(original)
    if compact is None or original is None or ours is None or theirs is None:
        return ""
    change, _ = between(compact, original, table.averaged)
    head = "Renumbering positions costs." if change.sign < 0 else "Position ids."
    names = task_names(list(table.tasks))
    shared = [task for task in table.tasks if task in compact.cells and task in original.cells]
    apart = max(shared, key=lambda task: abs(compact.cells[task].score.value - original.cells[task].score.value))
    none = next((row for row in table.rows if not row.drops and apart in row.cells), None)
    full = f" (none: {percent(none.cells[apart].score.value)})" if none else ""
    return (
        f"**{head}** At ratio {RATIO}, PyramidDrop as published (renumbered, compact) changes the average by "
        f"{signed(ours)}, with original positions by {signed(theirs)}: compact minus original {signed(change)}"
        f"{indistinct(change)} ([positions.md]({place}/tables/positions.md)). "
        f'They differ most on "{names[apart]}": {percent(compact.cells[apart].score.value)} and '
        f"{percent(original.cells[apart].score.value)} %{full}."
    )


def change_of(row: Row | None) -> Estimate | None:
    """The average minus that of dropping nothing."""
    return row.average.delta if row is not None and row.average is not None else None


def fragile(table: Table) -> str:
    """The sentence on the tasks that lose most with PyramidDrop at one ratio, and those that may lose nothing."""
    row = next((row for row in table.rows if row.spec.method == "pyramiddrop" and row.budget == RATIO), None)
    none = next((row for row in table.rows if not row.drops), None)
    if row is None or none is None:
        return ""
    names = task_names(list(table.tasks))
    changes = [(cell.delta, task) for task, cell in row.cells.items() if cell.delta is not None and task in none.cells]
    lost = sorted((change.value, task) for change, task in changes if change.sign < 0)
    same = [f'"{names[task]}"' for change, task in changes if not change.clear]
    told = [
        f'"{names[task]}" from {percent(none.cells[task].score.value)} to {percent(row.cells[task].score.value)} %'
        for _, task in lost
    ]
    if not told:
        return f"At ratio {RATIO}, no task of PyramidDrop's is distinguishable from none." if same else ""
    rest = f" Not distinguishable from none: {', '.join(same)}." if same else ""
    return f"**Tasks differ.** At ratio {RATIO}, PyramidDrop takes {', '.join(told)}.{rest}"


def twins(table: Table) -> str:
    """The sentence on rankings against random dropping at the same layers."""
    held = [(row, row.against_random) for row in table.rows if row.against_random is not None]
    if not held:
        return ""
    judged = [change for _, change in held if not change.anecdote]
    better, worse = (sum(change.sign == sign for change in judged) for sign in (1, -1))
    told = "; ".join(
        f"{method_name(method)} "
        + ", ".join(f"{signed(change)} at {row.budget}" for row, change in held if row.spec.method == method)
        for method in dict.fromkeys(row.spec.method for row, _ in held)
    )
    beat, lose = ("beats" if better == 1 else "beat"), ("loses" if worse == 1 else "lose")
    said = f"{better} {beat} it and {worse} {lose} to it" if judged else "none is judged"
    if single := len(held) - len(judged):
        what = "a single random seed, which settles nothing"
        said += f": all have {what}" if not judged else f", and {single} {'has' if single == 1 else 'have'} {what}"
    return (
        f"**Attention against chance.** Of {len(held)} rankings in the table above that have a random twin, "
        f"{said}. Differences: {told}."
    )


def attention(table: Table | None) -> str:
    """The sentence on the attention that the image gets, by layer, and whether layers agree on its best tokens."""
    for study in attention_studies(table) if table is not None else ():
        mass, top = study.layer_means("mass"), study.layer_means("top")
        least, most = (pick(range(len(mass)), key=lambda n: mass[n].value) for pick in (min, max))
        pairs = stability(study, [QUARTER]).get(QUARTER, {})
        agree = ""
        if pairs:
            shared = sum(pair.shared.value for pair in pairs.values()) / len(pairs)
            level = next(iter(pairs.values())).chance
            agree = (
                f" The best attended quarters of two layers overlap by {percent(shared)} % (intersection over union, "
                f"mean over pairs of layers; chance {percent(level)} %)."
            )
        return (
            f"**Attention.** The image gets {percent(mass[least].value)} % (layer {study.layers[least]}) to "
            f"{percent(mass[most].value)} % (layer {study.layers[most]}) of the last instruction token's attention; "
            f"the best attended tenth of the image's tokens holds "
            f"{percent(sum(one.value for one in top) / len(top))} % of that, mean over layers.{agree}"
        )
    return ""
