"""Overlap of kept sets: between layers and between methods, against chance.

python -m pytest tests/analysis/test_overlap.py
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from analysis.report import explain
from analysis.store.load import load_runs
from analysis.studies import overlap_figure
from analysis.studies.overlap import chance, kept_sets, overlap
from analysis.studies.redundancy import studies
from tests.support.records import grid, make_record, put, run_of, table_of


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study whose ranking is the same at every layer, and whose control draws anew at each."""
    return grid(tmp_path_factory.mktemp("store"))


@pytest.mark.parametrize(("tokens", "first", "second"), [(5, 2, 3), (6, 6, 2), (4, 0, 2), (5, 2, 2)])
def test_chance_is_the_mean_over_all_pairs_of_sets(tokens: int, first: int, second: int) -> None:
    shares = [
        len(set(a) & set(b)) / len(set(a) | set(b))
        for a in combinations(range(tokens), first)
        for b in combinations(range(tokens), second)
    ]
    assert chance(tokens, first, second) == pytest.approx(np.mean(shares))


def test_overlap_by_hand() -> None:
    def sets(*masks: str) -> dict[tuple[str, str], tuple[np.ndarray, str]]:
        return {("toy", str(i)): (np.array([bit == "1" for bit in mask]), f"image{i}") for i, mask in enumerate(masks)}

    found = overlap(sets("1100", "0110", "0000"), sets("0110", "0110", "0000"))
    assert found is not None and found.samples == 2, "where neither keeps a token there is nothing to share"
    assert found.shared.value == pytest.approx((1 / 3 + 1) / 2) and found.chance == pytest.approx(chance(4, 2, 2))
    assert found.shared.low <= found.shared.value <= found.shared.high
    assert overlap(sets("0000"), sets("0000")) is None
    with pytest.raises(ValueError, match="4 visual tokens in one run, 3 in the other"):
        overlap(sets("1100"), sets("110"))


def test_a_stable_ranking_shares_all_and_a_random_one_what_chance_shares(store: Path) -> None:
    (study,) = studies(table_of(store, "cuts"))
    pairs = overlap_figure.stability(study)
    assert sorted(pairs) == [0.1, 0.25, 0.5] and all(len(shared) == 6 for shared in pairs.values())
    assert {found.shared.value for shared in pairs.values() for found in shared.values()} == {1.0}
    first, second = (kept_sets(study.blind[layer, 0.25].runs[0]) for layer in (1, 6))
    found = overlap(first, second)
    assert found is not None and found.shared.low <= found.chance <= found.shared.high
    drawn = overlap_figure.matrices(study.layers, pairs)
    *panels, bar = drawn.axes
    assert [len(axes.texts) for axes in panels] == [6, 6, 6]
    assert bar.get_ylabel().startswith("from chance (0)") and panels[0].images[0].get_clim() == (0, 100)
    assert "chance 15" in drawn.axes[1].get_title()
    names = [name for name, _ in overlap_figure.files(table_of(store, "cuts"))]
    assert names == ["cuts-overlap"]


def test_diff_says_how_far_two_runs_agree(tmp_path: Path) -> None:
    for method in ("pyramiddrop", "random"):
        put(tmp_path, make_record(method, 0.5))
    told = explain.diff(run_of(tmp_path, "pyramiddrop"), run_of(tmp_path, "random"))
    lines = [line for line in told.splitlines() if "  boundary " in line]
    assert [line.split(":")[0].strip() for line in lines] == ["boundary 3", "boundary 6", "boundary 9"]
    assert "chance 33" in lines[0] and "over 180 samples" in lines[0]
    put(tmp_path, make_record("none", 1.0))
    assert "boundary" not in explain.diff(run_of(tmp_path, "none"), load_runs(tmp_path)[-1])
