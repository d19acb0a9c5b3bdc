"""The shipped model is worth measuring: it sees, and what it says comes from what it sees."""

import json

import pytest

from pdrop.embedded.corpus import FLOORS_FILE
from pdrop.embedded.corpus import FOLDER as DATA
from pdrop.embedded.model import FOLDER as MODEL
from recipes.embedded.score import score


@pytest.mark.slow
def test_it_beats_the_best_blind_guess_and_needs_its_image():
    floors = {f: entry["floor"] for f, entry in json.loads((DATA / FLOORS_FILE).read_text())["families"].items()}
    seen, blind = score(MODEL, limit=40), score(MODEL, limit=40, blind=True)
    learned = [family for family, floor in floors.items() if seen[family] >= floor + 0.3]
    assert len(learned) >= 5, seen
    for family in learned:
        # 40 questions: two standard errors of a fair coin are 16 points
        assert blind[family] <= floors[family] + 0.16, f"{family}: {blind[family]} with no image to look at"
    assert (MODEL / "model.safetensors").stat().st_size <= 12e6
