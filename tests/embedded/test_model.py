"""The shipped model is worth measuring: it sees, and what it says comes from what it sees."""

import json

import pytest

from pdrop.embedded.corpus import FLOORS_FILE
from pdrop.embedded.corpus import FOLDER as DATA
from pdrop.embedded.model import FOLDER as MODEL
from recipes.embedded.score import score


@pytest.mark.slow
@pytest.mark.parametrize("limit", [pytest.param(40, marks=pytest.mark.exhaustive), 10])
def test_it_beats_the_best_blind_guess_and_needs_its_image(limit):
    floors = {f: entry["floor"] for f, entry in json.loads((DATA / FLOORS_FILE).read_text())["families"].items()}
    seen, blind = score(MODEL, limit=limit), score(MODEL, limit=limit, blind=True)
    learned = [family for family, floor in floors.items() if seen[family] >= floor + 0.3]
    assert len(learned) >= 5, seen
    for family in learned:
        # two standard errors of a fair coin: of 40 questions 16 points
        assert blind[family] <= floors[family] + 1 / limit**0.5, f"{family}: {blind[family]} with no image to look at"
    assert (MODEL / "model.safetensors").stat().st_size <= 12e6
