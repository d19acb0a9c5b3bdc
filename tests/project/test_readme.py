"""The results in README.md and docs/results.md are those of the records, and the map is the tree."""

import re
from pathlib import Path

import pytest

from analysis.__main__ import main
from analysis.report import readme
from analysis.style import task_names
from analysis.tables.text import signed
from tests.support.records import fill, make_record, put, table_of

ROOT = Path(__file__).resolve().parents[2]
README, RESULTS = (ROOT / page for page in readme.PAGES)
MAP = (ROOT / "CONTRIBUTING.md").read_text().split("## The map")[1].split("```")[1]


def between(text: str, name: str) -> str:
    start, end = readme.marks(name)
    return text.split(start)[1].split(end)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of the first Markdown table of a text."""
    (table,) = re.findall(r"(?:^\|.*\n)+", text, re.M)[:1]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_the_readme_is_short():
    text = README.read_text()
    assert len(text.splitlines()) <= 160
    shown = between(text, readme.SHORT)
    assert 2 < len(rows(shown)) - 2 <= readme.MOST and len(re.findall(r"!\[", text)) == 1


# the folders of the map come into being when the sources are moved into them
@pytest.mark.skipif(not (ROOT / "pdrop/cost").is_dir(), reason="the sources have not been moved into the map's folders")
def test_the_map_names_the_tree():
    folder, named = Path(), set()
    for line in MAP.strip("\n").splitlines()[1:]:
        words = re.split(r" {2,}", line.strip())[0].split()
        folder = Path() if not line.startswith(" ") else Path("pdrop")
        for word in words:
            assert (ROOT / folder / word).exists(), f"the map names {folder / word}"
            named.add((folder / word).as_posix())
    for path in [*ROOT.glob("*.py"), *(ROOT / "pdrop").glob("*")]:
        if path.name not in ("__pycache__", "py.typed") and not path.name.endswith(".egg-info"):
            assert path.relative_to(ROOT).as_posix() in named, f"the map does not name {path.name}"


def test_the_numbers_shown_are_those_of_the_records():
    made = {}
    for page in (README, RESULTS):
        text = page.read_text()
        assert readme.written(page, ROOT / "results/reference", made) == text, (
            "python -m analysis readme --results results/reference"
        )
    demo = (ROOT / "results/reference/tables/demo.md").read_text()
    shown = between(RESULTS.read_text(), readme.LONG)
    table = re.search(r"\| budget .*?\n\n", shown, re.S)
    assert table and table[0].count("\n") > 10
    assert table[0] in demo, "make reference"
    whole = [set(row) for row in rows(demo)]
    for row in rows(between(README.read_text(), readme.SHORT))[2:]:
        assert any(set(row) <= cells for cells in whole), f"{row} is not a row of demo.md: make reference"


def test_what_is_said_follows_the_records(tmp_path):
    store, n = tmp_path / "results", 100  # few flips are distinguishable from none
    fill(store, n=n)
    put(store, make_record("pyramiddrop", 0.5), n, experiment="positions")
    put(store, make_record("pyramiddrop", 0.5, positions="original"), n, experiment="positions")
    put(store, make_record("none", 1.0), n, experiment="positions")
    page = tmp_path / "README.md"
    start, end = readme.marks(readme.LONG)
    page.write_text(f"before {start} old {end} after {start.replace('results', 'demo')}")
    assert main(["readme", "--results", str(store), "--readme", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before ") and text.endswith(" after <!-- demo -->") and " old " not in text
    said = " ".join(text.split())
    demo = table_of(store)
    (best,) = (r for r in demo.rows if r.spec.method == "pyramiddrop" and r.budget == "0.5")
    assert f"PyramidDrop {signed(best.against_random)} at 0.5" in said
    assert "Of 2 rankings in the table above that have a random twin, 2 beat it and 0 lose" in said
    assert f"changes the average by {signed(best.average.delta)}, with original" in said
    assert "**Position ids.**" in said, "the same scores: nothing costs"
    assert "compact minus original 0.0 [0.0, 0.0], not distinguishable" in said
    lost, same = said.split("PyramidDrop takes ")[1].split(" - **")[0].split(" Not distinguishable from none: ")
    for task, cell in best.cells.items():
        change = cell.delta
        assert change is not None
        shown = f'"{task_names(list(demo.tasks))[task]}"'
        assert (shown in lost) == (change.sign < 0) and (shown in same) == (not change.clear), task
    assert "results/tables/demo.md" in said and "layer" not in said.split("What this model shows")[1]
    start, end = readme.marks(readme.SHORT)
    page.write_text(f"{start}{end}")
    assert main(["readme", "--results", str(store), "--readme", str(page)]) == 0
    ratios = {cells[1] for cells in rows(page.read_text())[2:]}
    assert best.spec.schedule in ratios and not any(":0.3" in schedule for schedule in ratios)
    page.write_text("no place")
    assert main(["readme", "--results", str(store), "--readme", str(page)]) == 1
