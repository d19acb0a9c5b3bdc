"""Files of a store: no links are followed, nothing is cut off, the user's umask holds."""

import os
import stat

import pytest

from pdrop.evaluation.answers import Answer, AnswerStore, Question
from pdrop.store import holder, locked, open_in_place, refuse_links, write_atomically
from tests.contracts.test_record import record

ANSWER = Answer("p", "yes", 1, 1, 1, [1], ["1"])


def lock(folder):
    with locked(folder):
        pass


def answer(folder):
    AnswerStore(folder / "answers.jsonl").add([(Question("t", 0, 0, "?", list), ANSWER)])


WRITERS = {".lock": lock, "answers.jsonl": answer}


@pytest.mark.parametrize("name", WRITERS)
def test_nothing_is_written_through_a_link(tmp_path, name):
    elsewhere = tmp_path / "diary.txt"
    elsewhere.write_text("")  # an answer store would read any other as a store of another version
    before = elsewhere.stat()
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(ValueError, match=f"{name} is not a file of a store but a link: remove it"):
        WRITERS[name](folder)
    assert elsewhere.stat().st_mtime_ns == before.st_mtime_ns and elsewhere.read_text() == ""
    with pytest.raises(ValueError, match=f"{name} is a link"):
        refuse_links(folder)
    (folder / name).unlink()
    WRITERS[name](folder)
    assert (folder / name).is_file()


def test_a_lock_cuts_nothing_off_and_says_who_holds_it(tmp_path):
    (tmp_path / ".lock").write_text("mine")
    with locked(tmp_path, answered=7):
        assert (holder(tmp_path)["pid"], holder(tmp_path)["answered"]) == (os.getpid(), 7)
    assert (tmp_path / ".lock").read_text() == "mine" and holder(tmp_path) is None


def test_pipes_and_folders_are_no_files_of_a_store(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, what in (("pipe", "a pipe"), ("folder", "a folder")):
        with pytest.raises(ValueError, match=f"{name} is not a file of a store but {what}"):
            os.close(open_in_place(tmp_path / name, os.O_RDWR))


def test_a_run_folder_that_is_or_holds_a_link_is_refused(tmp_path):
    refuse_links(tmp_path / "not yet")
    (tmp_path / "real").mkdir()
    refuse_links(tmp_path / "real")
    (tmp_path / "run").symlink_to(tmp_path / "real")
    with pytest.raises(ValueError, match="run is a link, and nothing is written through links"):
        refuse_links(tmp_path / "run")
    (tmp_path / "real" / "samples").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="samples is a link"):
        refuse_links(tmp_path / "real")


@pytest.mark.parametrize("name", [".lock", "answers.jsonl", "record.json", "samples.zip"])
def test_a_run_folder_that_holds_a_pipe_is_refused_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is no file of a store but a pipe: remove it"):
        refuse_links(tmp_path)


def test_a_record_replaces_a_link(tmp_path):
    elsewhere = tmp_path / "diary.txt"
    elsewhere.write_text("mine")
    (tmp_path / "record.json").symlink_to(elsewhere)
    record().write(tmp_path)
    assert elsewhere.read_text() == "mine" and not (tmp_path / "record.json").is_symlink()


@pytest.mark.parametrize("mask", [0o002, 0o022, 0o077])
def test_files_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "a" / "record.json", "{}")
        lock(tmp_path / "b")
        answer(tmp_path / "c")
    finally:
        os.umask(before)
    files = [tmp_path / "a" / "record.json", tmp_path / "b" / ".lock", tmp_path / "c" / "answers.jsonl"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~mask}
