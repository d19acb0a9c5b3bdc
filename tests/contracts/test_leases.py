"""Leases: one holder at a time, whatever the clocks say; of those who want a stale one exactly one gets it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pdrop import leases, store
from pdrop.cli.compose import settings
from pdrop.record import RunRecord
from pdrop.runs import run as runs

# of another machine, which cannot be asked whether it lives
AWAY = {"host": "node7", "boot": "another", "namespace": 1, "pid": 1, "started": "1"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASE", 1.0)
    monkeypatch.setattr(leases, "BEAT", 0.05)


def away(folder: Path, number: int = 1) -> Path:
    """A lease of another machine."""
    path = folder / f"{leases.NAME}{number}"
    path.write_text(json.dumps(AWAY))
    return path


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_one_holds_a_folder_until_it_lets_go(tmp_path: Path) -> None:
    first = leases.take(tmp_path)
    assert first is not None and leases.held(tmp_path)
    end = time.monotonic() + 1.5 * leases.LEASE
    while time.monotonic() < end:
        assert leases.take(tmp_path) is None, "it gives signs of life"
        time.sleep(0.1)
    first.check()
    first.release()
    assert not leases.held(tmp_path)
    second = leases.take(tmp_path)
    assert second is not None and second.number == 2 and files(tmp_path) == [".lease-2"], "the older number has gone"
    second.release()


def test_a_stale_one_is_taken_over_whatever_its_clock_says(tmp_path: Path) -> None:
    """Of machines whose clocks are ten years slow, right, and ten years fast."""
    folders = [tmp_path / name for name in ("slow", "right", "fast")]
    for folder in folders:
        folder.mkdir()
        away(folder)
    started, beats = time.monotonic(), [time.time() + skew for skew in (-3e8, 0.0, 3e8)]
    while time.monotonic() < started + 1.5 * leases.LEASE:  # they live: the files' times move, and be it backwards
        for number, folder in enumerate(folders):
            beats[number] -= 1
            os.utime(folder / ".lease-1", (beats[number], beats[number]))
            assert leases.take(folder) is None
        time.sleep(0.1)
    last, waiting = time.monotonic(), list(folders)
    while waiting:
        assert time.monotonic() < last + 20
        for folder in list(waiting):
            if (taken := leases.take(folder)) is not None:
                assert taken.number == 2 and time.monotonic() - last >= 0.7 * leases.LEASE
                taken.release()
                waiting.remove(folder)
        time.sleep(0.02)


WANT = """
import sys, time
from pathlib import Path
from pdrop import leases
leases.LEASE, leases.BEAT = 1.0, 0.05
folder = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
end = time.monotonic() + 2.5
while (mine := leases.take(folder)) is None and time.monotonic() < end:
    time.sleep(0.001)
print("none" if mine is None else mine.number, flush=True)
sys.stdin.readline()
"""


def test_of_several_that_want_a_stale_one_exactly_one_gets_it(tmp_path: Path) -> None:
    away(tmp_path, 4)
    command = [sys.executable, "-c", WANT, str(tmp_path)]
    racers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) for _ in range(5)
    ]
    said: list[list[str]] = [[] for _ in racers]
    for _ in range(2):  # ready, and what came of it
        for racer, lines in zip(racers, said):
            assert racer.stdout is not None and racer.stdin is not None
            lines.append(racer.stdout.readline().strip())
            if lines == ["ready"] and racer is racers[-1]:
                for other in racers:
                    assert other.stdin is not None
                    other.stdin.write("go\n")
    for racer in racers:
        racer.kill()
        racer.communicate()
    assert sorted(lines[1] for lines in said) == ["5", *["none"] * 4] and files(tmp_path) == [".lease-5"]
    mine = leases.take(tmp_path)
    assert mine is not None, "a killed process of this machine is not waited for"
    mine.release()


def test_who_looked_long_ago_does_not_start_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    away(tmp_path, 5)
    looks = iter([3])
    find = leases.newest
    monkeypatch.setattr(leases, "newest", lambda folder: next(looks, None) or find(folder))
    monkeypatch.setattr(leases, "_gone", lambda *_: True)
    assert leases.take(tmp_path) is None and files(tmp_path) == [".lease-5"]


def test_who_was_taken_over_stops(tmp_path: Path) -> None:
    with pytest.raises(store.Held, match="taken over"), store.locked(tmp_path, kind="lease") as held:  # noqa: PT012
        held.check()
        store.write_atomically(tmp_path / store.HOLDER, '{"host": "node7", "pid": 1}')
        away(tmp_path, 2)
        time.sleep(10)  # what it does is interrupted
    assert store.noted(tmp_path / store.HOLDER)["host"] == "node7", "the note is the other's"
    assert files(tmp_path) == [".holder", ".lease-1", ".lease-2"]


def test_a_run_that_was_taken_over_leaves_the_record_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dials = {"model": "llava_1_5_7b", "tasks": [], "latency": "off", "device": "cpu", "locks": "lease"}
    mine = settings({**dials, "results": str(tmp_path)})
    measure, theirs = runs.measure, []

    def slow(record: RunRecord, *more: object) -> None:
        """This process stands still; another one does the run meanwhile, and lets go."""
        measure(record, *more)  # type: ignore[arg-type]
        theirs.append(replace(record, status="done", wall_s=77.0))
        theirs[0].write(mine.folder)
        (mine.folder / f"{leases.NAME}2").write_bytes(leases.FREE)

    monkeypatch.setattr(runs, "measure", slow)
    assert runs.run(mine).wall_s == 77.0 == RunRecord.read(mine.folder).wall_s and len(theirs) == 1


def test_which_of_both_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "_file_system", lambda device: "ext4")
    with store.locked(tmp_path):
        assert files(tmp_path) == [".holder", ".lock"], "of this machine alone"
    monkeypatch.setattr(leases, "_file_system", lambda device: "nfs4")
    with store.locked(tmp_path, answered=3):
        assert (store.holder(tmp_path) or {})["answered"] == 3
        monkeypatch.setattr(leases, "_file_system", lambda device: "ext4")
        with pytest.raises(store.Held, match=f"process {os.getpid()}"), store.locked(tmp_path, wait=False):
            pass  # as it is held, whatever the disk
    assert store.holder(tmp_path) is None
    with pytest.raises(ValueError, match=r"locks is auto \| flock \| lease, not 'nfs'"):
        settings({"tasks": [], "locks": "nfs", "device": "cpu"})


def test_who_waits_goes_on_when_it_is_let_go(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    taken = threading.Event()

    def other() -> None:
        with store.locked(tmp_path, kind="lease"):
            taken.set()
            while "waiting" not in caplog.text:
                time.sleep(0.01)

    thread = threading.Thread(target=other)
    thread.start()
    assert taken.wait(10)
    with store.locked(tmp_path):
        assert leases.newest(tmp_path) == 2
    thread.join()


def refused(*_: object) -> None:
    """What flock says on a file system that has no locks (Lustre without -o flock, a server without its service)."""
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_where_flock_is_refused_a_lease_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.fcntl, "flock", refused)
    with store.locked(tmp_path, answered=3):
        assert leases.newest(tmp_path) == 1 and (store.holder(tmp_path) or {})["answered"] == 3
        with pytest.raises(store.Held), store.locked(tmp_path, wait=False):
            pass
    assert store.holder(tmp_path) is None
    (tmp_path / "other").mkdir()
    with (
        pytest.raises(ValueError, match=r"other cannot be locked by flock .*: use locks=lease$"),
        store.locked(tmp_path / "other", kind="flock"),
    ):
        pass


def test_a_lease_that_another_machine_removed_while_it_was_read_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS says so after the file was opened."""
    away(tmp_path)

    def stale(handle: int) -> os.stat_result:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as server:
        server.setattr(leases.os, "fstat", stale)
        assert leases.take(tmp_path) is None
    assert files(tmp_path) == [".lease-1"]


def test_a_server_that_fails_at_the_end_does_not_undo_what_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> int:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with store.locked(tmp_path, kind="lease"):
        monkeypatch.setattr(leases.os, "pwrite", fails)
    assert "others wait 1 s for its lease" in caplog.text


def test_a_full_disk_leaves_no_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk:
        disk.setattr(leases.os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*\.lease-1'"):
            leases.take(tmp_path)
    assert files(tmp_path) == []
