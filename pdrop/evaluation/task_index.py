"""Finds lmms-eval's tasks and their files in a fraction of a second, without importing lmms-eval.

lmms-eval's own index parses some 2000 YAML files (5 s). Here one regular expression reads each file's `task:`,
`group:` and `tag:` lines, so that a misspelt task fails before any model is loaded. Tasks of the project's own
folders shadow lmms-eval's (lmms-eval does the reverse: a project's `mme` would be ignored).

    find(["mme", "pope_full"], task_dirs=["my/tasks"])
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from pdrop.evaluation.answers import described
from pdrop.names import check

# our own tasks: of the embedded corpus, and of benchmarks that lmms-eval lacks or scores differently
OWN_TASKS = ("package://pdrop.embedded/tasks", "package://pdrop.evaluation/tasks")
_DATA_FILE = re.compile(r"[\w./-]+\.(?:parquet|jsonl?|csv|arrow)\b")
_KEY = re.compile(r"^[\"']?(task|group|tag|include)[\"']?[ \t]*:[ \t]*(.*)$", re.MULTILINE)
_ITEM = re.compile(r"^[ \t]*-[ \t]*(?:task[ \t]*:[ \t]*)?([^\s#{}:]+)[ \t]*(?:#.*)?$")


@dataclass
class Entry:
    """A name of a task, group or tag: the file that defines it, and its members if it is a group or a tag."""

    path: Path
    members: list[str] = field(default_factory=list)
    also: list[Path] = field(default_factory=list)  # further files of the same folder that define the name


def find(names: Sequence[str], task_dirs: Sequence[str | Path] = (), also: Sequence[str] = ()) -> dict[str, list[Path]]:
    """For each name, the YAML files that define it and, for a group or a tag, its members.

    Args:
        names: Tasks, groups or tags.
        task_dirs: Folders with the user's own tasks (also "package://module/folder"); earlier folders take precedence.
        also: Other names that the user may have meant, such as those of sets of tasks.

    Raises:
        ValueError: If a name is unknown (close matches are named), or `names` is empty.
    """
    entries = index(task_dirs)
    if unknown := [name for name in names if name not in entries]:
        known = [*also, *entries]
        raise ValueError("; ".join(f"unknown task {name!r}{_suggest(name, known)}" for name in unknown))
    return {name: list(dict.fromkeys(_files(name, entries, ()))) for name in names}


def index(task_dirs: Sequence[str | Path] = ()) -> dict[str, Entry]:
    """All names of the project's folders and of lmms-eval."""
    entries: dict[str, Entry] = {}
    for directory in map(_folder, (*task_dirs, *OWN_TASKS)):
        entries = _scan(directory) | entries
    return _installed() | entries


def digest(tasks: tuple[str, ...], folders: tuple[str, ...]) -> str:
    """12 hex digits over the files of tasks that do not come with lmms-eval and the local data they name; "" if none.

    Raises:
        ValueError: If a task is unknown; close matches are named.
    """
    return content(own_folders(tasks, folders))


def own_folders(tasks: Sequence[str], folders: Sequence[str]) -> tuple[Path, ...]:
    """The folders of tasks' files that do not come with lmms-eval, sorted.

    Raises:
        ValueError: If a task is unknown; close matches are named.
    """
    installed = installed_folder()
    found = {path for paths in find(tasks, folders).values() for path in paths}
    return tuple(sorted({folder for folder in (path.parent for path in found) if installed not in folder.parents}))


@functools.cache
def content(own: tuple[Path, ...]) -> str:
    """12 hex digits over the files in folders of tasks, and the local data they name; "" without folders. Read once."""
    if not own:
        return ""
    found = hashlib.sha256()
    for folder in own:
        for path in files_of(folder):
            found.update(f"{path.name}:".encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:12]


def files_of(folder: Path) -> list[Path]:
    """The files in a folder of tasks and the local data that they name, resolved and sorted."""
    there = {path for path in folder.iterdir() if path.is_file()}
    named = {folder / name for file in there for name in _DATA_FILE.findall(file.read_text(errors="replace"))}
    return sorted({path.resolve() for path in there | named if path.is_file()})


def definitions(folders: Sequence[str]) -> str:
    """12 hex digits over the YAML files of the project's folders: if equal, a name means the same files."""
    found = hashlib.sha256()
    for folder in map(_folder, (*folders, *OWN_TASKS)):
        for path in sorted(folder.rglob("*.yaml")):
            found.update(f"{path.relative_to(folder)}:".encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:12]


def is_shipped(folder: Path) -> bool:
    """Whether a folder of tasks comes with lmms-eval or with this project."""
    return any(home == folder or home in folder.parents for home in (installed_folder(), *map(_folder, OWN_TASKS)))


def installed_folder() -> Path:
    """The folder of lmms-eval's own tasks.

    Raises:
        ValueError: If it is not installed.
    """
    package = find_spec("lmms_eval")
    if package is None or not package.submodule_search_locations:
        raise ValueError("lmms-eval is not installed: pip install lmms-eval==0.7.3")
    return Path(package.submodule_search_locations[0]) / "tasks"


@functools.lru_cache(maxsize=1)
def _installed() -> dict[str, Entry]:
    return _scan(installed_folder())


def _folder(directory: str | Path) -> Path:
    text = str(directory)
    if text.startswith("package://"):
        module, _, inside = text.removeprefix("package://").partition("/")
        try:
            folder = Path(str(files(module))) / inside
        except (ImportError, SystemExit) as error:  # finding a package runs its __init__.py
            raise ValueError(f"task_dirs: {text}: {described(error)}") from error
    else:
        folder = Path(text).expanduser()
    if not folder.is_dir():
        raise ValueError(f"task_dirs: no folder {text}")
    return folder


def _scan(root: Path) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    tags: dict[str, Entry] = {}
    for path in sorted(root.rglob("*.yaml")):
        keys = _keys(path)
        task, several = keys.get("task", ([], False))
        names = keys.get("group", ([], False))[0]
        if names and (several or not task):
            entries[names[0]] = Entry(path, task, again(entries.get(names[0])))
        elif task and not several:
            entries[task[0]] = Entry(path, also=again(entries.get(task[0])))
            for tag in keys.get("tag", ([], False))[0] + names:
                members = tags.setdefault(tag, Entry(path)).members
                members += [task[0]] if task[0] != tag else []
    return tags | entries


def again(entry: Entry | None) -> list[Path]:
    """The files that already define a name."""
    return [] if entry is None else [*entry.also, entry.path]


def _keys(path: Path, within: tuple[Path, ...] = ()) -> dict[str, tuple[list[str], bool]]:
    """The values of a file's keys and whether they are written as a list; keys of included files count too."""
    text = path.read_text(encoding="utf8", errors="replace")
    keys: dict[str, tuple[list[str], bool]] = {}
    for match in _KEY.finditer(text):
        keys.setdefault(
            match[1], (_values(text, match), not match[2].split(" #")[0].strip() or match[2].startswith("["))
        )
    for name in keys.pop("include", ([], False))[0]:
        included = path.parent / name
        if included.resolve() in (path.resolve(), *within):
            raise ValueError(f"{path} includes itself (include: {name}): take that line out")
        keys = (_keys(included, (*within, path.resolve())) if included.is_file() else {}) | keys
    return keys


def _values(text: str, match: re.Match[str]) -> list[str]:
    """The scalar, flow list or block list that follows a top-level key."""
    inline = match[2].split(" #")[0].strip()
    if inline:
        return [part.strip().strip("\"'") for part in inline.strip("[]").split(",") if part.strip()]
    values = []
    for line in text[match.end() :].split("\n")[1:]:
        if line and not line[0].isspace() and not line.startswith(("-", "#")):
            break
        if item := _ITEM.match(line):
            values.append(item[1].strip("\"'"))
    return values


def _files(name: str, entries: dict[str, Entry], seen: tuple[str, ...]) -> Iterator[Path]:
    entry = entries[name]
    check(f"a task of {entry.path}", name)  # its samples are stored in a file of this name
    if entry.also and not is_shipped(entry.path.parent):
        files = " and ".join(sorted(str(path) for path in (entry.path, *entry.also)))
        raise ValueError(f"task {name!r} is defined in {files}: rename one of them")
    yield entry.path
    for member in entry.members:
        if member in entries and member not in seen:
            yield from _files(member, entries, (*seen, name))


def _suggest(name: str, entries: Sequence[str]) -> str:
    close = get_close_matches(name, entries, n=4, cutoff=0.6)
    close += [other for other in sorted(entries) if name.lower() in other.lower() and other not in close][
        : 4 - len(close)
    ]
    return (
        f" (did you mean {', '.join(close)}?)" if close else " (`python -m lmms_eval --tasks list` lists lmms-eval's)"
    )
