"""Who holds a run's folder, and what has become of a run whose process has gone."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from pdrop import pace, store

HOLD = """
import sys, time
from pathlib import Path
from pdrop.store import locked
with locked(Path(sys.argv[1]), answered=3):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_run_is_running_while_its_process_lives(tmp_path: Path) -> None:
    assert store.state(tmp_path, "running", None) == "stopped", "nobody holds it"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        note = store.holder(tmp_path)
        assert note is not None and (note["pid"], note["answered"]) == (process.pid, 3) and note["since"] > 0
        assert store.state(tmp_path, "running", None) == "running"
        process.send_signal(signal.SIGKILL)
    assert json.loads((tmp_path / store.HOLDER).read_text())["pid"] == process.pid, "the note outlives a kill"
    assert store.holder(tmp_path) is None and store.state(tmp_path, "running", None) == "stopped"
    with store.locked(tmp_path):
        assert (store.holder(tmp_path) or {})["pid"] == os.getpid()
    assert store.holder(tmp_path) is None and not (tmp_path / store.HOLDER).exists()


def test_an_interrupt_is_no_failure(tmp_path: Path) -> None:
    assert store.state(tmp_path, "failed", "Traceback ...\nKeyboardInterrupt\n") == "stopped"
    assert store.state(tmp_path, "failed", "Traceback ...\nValueError: no\n") == "failed"
    assert store.reason("Traceback ...\n  File\nValueError: no\n\n") == "ValueError: no" and store.reason(None) == ""


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # a file that can grow no further, as on a full disk
    try:
        with pytest.raises(OSError, match=re.escape(str(tmp_path / "record.json"))):
            store.write_atomically(tmp_path / "record.json", "x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list(tmp_path.iterdir()), "nothing half-written is left"


def test_away_from_a_terminal_a_line_is_said_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    monkeypatch.setattr(pace.time, "monotonic", lambda: now)
    caplog.set_level("INFO")
    said = pace.Pace("pope", "questions", done=40)
    for now, done in ((10.0, 45), (31.0, 50), (40.0, 60), (62.0, 102)):  # noqa: B007
        said.at(done, 140)
    assert [record.message for record in caplog.records] == [
        "pope: 50 of 140 questions, 3.1 s each, about 5 min left",
        "pope: 102 of 140 questions, 1.0 per s, about 38 s left",
    ]


def test_a_terminal_without_a_width_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """tqdm draws nothing there: a container's, or a script's."""
    main, side = os.openpty()
    with os.fdopen(side, "w") as screen, os.fdopen(main, "rb"):
        monkeypatch.setattr("sys.stderr", screen)
        for columns, drawn in ((0, False), (80, True)):
            fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
            assert pace.on_a_terminal() is drawn
