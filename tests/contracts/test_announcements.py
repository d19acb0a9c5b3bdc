"""What a process says that it is doing is shown while it lives, whatever the file system knows of locks."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pdrop import leases
from pdrop.announcements import alive, announced


def test_on_a_disk_of_this_machine_it_is_locked(tmp_path: Path) -> None:
    path = tmp_path / "sweeps" / "1.json"
    with announced(path, {"runs": {}}) as mine:
        mine.tell(run=2)
        os.utime(path, (0, 0))
        assert alive(path) and '"run": 2' in path.read_text(), "its time says nothing"
    assert not path.parent.exists() and not alive(path)
    path.parent.mkdir()
    path.write_text("{}")
    assert not alive(path), "a kill left it"


def test_on_a_shared_one_its_time_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "_file_system", lambda device: "nfs4")
    monkeypatch.setattr(leases, "LEASE", 2.0)
    monkeypatch.setattr(leases, "BEAT", 0.05)
    path, long_ago = tmp_path / "sweeps" / "1.json", time.time() - 10
    with announced(path, {"runs": {}}):
        os.utime(path, (long_ago, long_ago))
        end = time.monotonic() + 20
        while not alive(path):
            assert time.monotonic() < end
            time.sleep(0.01)
    path.parent.mkdir()
    path.write_text("{}")
    assert alive(path)
    os.utime(path, (long_ago, long_ago))
    time.sleep(0.2)
    assert not alive(path), "a killed process renews nothing, and neither does one that has ended"
