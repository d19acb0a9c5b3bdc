"""The redundancy study: which layers still need the visual tokens? Found in a table's schedules, whatever its name.

The protocol of PyramidDrop (arXiv 2410.17247, section 3.1, Fig. 1 and 3): drop once, on the input of layer k, keep the
fraction r that a method ranks highest, leave the rest of the forward unchanged, for a grid of k x r. A layer whose
curve stays flat down to small r does not need most of its visual tokens. pdrop adds a control, the same grid at random:
if random does as well, then the layer does not need the tokens, and the ranking did not find the right ones.

    python run.py -m experiments=redundancy && python -m analysis figures redundancy
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pdrop.schedule import Schedule

from ..comparison.against_random import is_random
from ..comparison.table_model import Row, Table, seedless

Place = tuple[int, float]  # boundary layer, keep


@dataclass(frozen=True)
class Study:
    """A grid of single boundaries, with scores of one method and, if they were run, at random.

    `ranked` and `blind` map (layer, keep) to rows; both may have gaps.
    """

    model: str
    method: str
    positions: str
    ranked: Mapping[Place, Row]
    blind: Mapping[Place, Row] = field(default_factory=dict)
    none: Row | None = None

    @property
    def layers(self) -> list[int]:
        return sorted({layer for layer, _ in (*self.ranked, *self.blind)})

    @property
    def keeps(self) -> list[float]:
        return sorted({keep for _, keep in (*self.ranked, *self.blind)})


def studies(table: Table) -> list[Study]:
    """The study of every method that was run with single boundaries at two or more layers and kept fractions.

    A random row is a control of the methods with its position policy, whatever its own name.
    """
    grids: dict[tuple[str, str, str, str], dict[Place, Row]] = {}
    for row in table.rows:
        place = single_boundary(row)
        if place is not None and row.status == "done":
            way = (row.spec.model, row.spec.method, row.spec.positions, seedless(row.spec))
            grids.setdefault(way, {})[place] = row
    found = []
    for (model, method, positions, _), ranked in grids.items():
        layers, keeps = {layer for layer, _ in ranked}, {keep for _, keep in ranked}
        if len(layers) < 2 or len(keeps) < 2 or any(is_random(row) for row in ranked.values()):
            continue
        blind = {
            place: row
            for (of, _, policy, _), grid in grids.items()
            for place, row in grid.items()
            if of == model and policy == positions and is_random(row) and place[0] in layers
        }
        none = next((r for r in table.rows if r.spec.model == model and not r.drops and r.status == "done"), None)
        found.append(Study(model, method, positions, ranked, blind, none))
    return found


def single_boundary(row: Row) -> Place | None:
    """Layer and keep of a schedule of one boundary; None for any other, and for counts of tokens."""
    stages = Schedule.parse(row.spec.schedule).stages
    if len(stages) != 1 or stages[0].keep is None:
        return None
    return stages[0].layer, stages[0].keep
