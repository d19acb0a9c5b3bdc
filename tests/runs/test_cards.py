"""Jobs that run beside each other get a card each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pdrop.runs import cards
from pdrop.runs.cards import first_free, visible

TAKE = """
import sys
from pathlib import Path
from pdrop.runs.cards import first_free
print(first_free(["0", "1", "MIG-a/b"], Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""


def taker(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", TAKE, str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_each_job_takes_another_card_and_leaves_it_when_it_ends(tmp_path: Path) -> None:
    jobs = [taker(tmp_path), taker(tmp_path)]
    taken = [job.stdout.readline().strip() for job in jobs if job.stdout is not None]
    assert sorted(taken) == ["0", "1"] and first_free(["0", "1", "MIG-a/b"], tmp_path) == "MIG-a/b"
    with pytest.raises(ValueError, match=r"all 2 cards .*hydra.launcher.n_jobs=2"):
        first_free(["0", "1"], tmp_path)
    jobs[taken.index("1")].kill()
    jobs[taken.index("1")].wait()
    assert first_free(["0", "1"], tmp_path) == "1", "a job that was killed holds nothing"
    jobs[taken.index("0")].communicate("")


def test_submitit_s_local_jobs_take_cards_that_the_command_saw(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """submitit hides all cards from them."""
    take = cards.claim.__wrapped__
    for seen, taken, left in (("2,5", "2", "2"), ("3", None, "3"), ("", None, "")):
        monkeypatch.setattr(cards, "first_free", lambda names: names[0])
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
        cards.offer()
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert take() is None and not visible(), "whoever hides them wants none to be used"
        monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
        assert take() == taken and os.environ["CUDA_VISIBLE_DEVICES"] == left
        monkeypatch.delenv("SUBMITIT_EXECUTOR")
    monkeypatch.delenv("PDROP_CARDS")


def test_which_cards_there_are(tmp_path: Path) -> None:
    assert visible({"CUDA_VISIBLE_DEVICES": "2, 5"}) == ["2", "5"] and visible({"CUDA_VISIBLE_DEVICES": ""}) == []
    for name in ("0000:07:00.0", "0000:0f:00.0"):
        (tmp_path / name).mkdir()
    assert visible({}, tmp_path) == ["0", "1"] and visible({}, tmp_path / "none") == []
