"""Which sources make a run's numbers, stated once, and their digest: part of a run's identity. Standard library only.

A run is repeated when one of these changes, and only then: the contracts, the engine, what the model is made of,
what is counted, what is timed, what is asked, and the method's own file with the method files that it imports. Not
the command lines, the trainer, the analysis, budgets (what they find is the schedule, which identifies the run
itself), cost breakdowns (text), the conformance suite, the corpus (its model is known by its weights, its tasks by
their files). Comments, docstrings and layout never count.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
# files and folders of the package; of methods/, a run counts what the engine and its own method import
NUMBERS = (
    *("schedule.py", "record.py", "shapes.py", "pictures.py"),
    *("engine", "models", "timing", "evaluation"),
    "cost/flops.py",
    *("runs/measured.py", "runs/worker.py", "runs/timed.py", "runs/timed_prompt.py"),
)
TRAINED = (*NUMBERS, "training")  # what makes the weights of a training
FOLLOWED = "methods"


def code_digest(methods: Iterable[Path] = (), parts: tuple[str, ...] = NUMBERS, package: Path = PACKAGE) -> str:
    """12 hex digits over the sources that make numbers.

    Args:
        methods: The files of the run's method, and of those it is made with.
        parts: Files and folders of the package that count.
        package: The package's folder.
    """
    return _digest(tuple(sources(methods, parts, package)))


def sources(methods: Iterable[Path] = (), parts: tuple[str, ...] = NUMBERS, package: Path = PACKAGE) -> list[Path]:
    """The files that count, sorted: those of `parts`, and the method files that these and `methods` import.

    For a method from outside the package, the files that it imports from its own package or folder count too.
    """
    found = {path for part in parts for path in _files(package / part)}
    waiting = sorted(found | {Path(path).resolve() for path in methods})
    while waiting:
        path = waiting.pop()
        found.add(path)
        more = {other for other in imported(path, package) if _follows(other, package)} - found
        waiting += sorted(more)
    return sorted(found)


def imported(path: Path, package: Path = PACKAGE) -> frozenset[Path]:
    """The package's files that a file imports, anywhere in it; for a file from outside, also its own package's."""
    root = package.parent if package in path.parents else _root(path)
    return _imported(path, package, root, _modules(path, root))


@functools.cache
def _imported(path: Path, package: Path, root: Path, names: frozenset[str]) -> frozenset[Path]:
    """The files of modules that a file names; `root` is the folder that it is imported from."""
    found: set[Path] = set()
    for name in names:
        if name.split(".")[0] == package.name:
            found |= _files_of(name, package.parent)
        elif package not in path.parents and _own(name, path, root):
            found |= _files_of(name, root)
    return frozenset(found)


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf8")


def _files(place: Path) -> Iterator[Path]:
    yield from place.rglob("*.py") if place.is_dir() else [place]


@functools.cache
def _digest(paths: tuple[Path, ...]) -> str:
    found = sorted(f"{path.name}\n{_meaning(path)}\n" for path in paths)  # their folder does not matter
    return hashlib.sha256("".join(found).encode()).hexdigest()[:12]


@functools.cache
def _meaning(path: Path) -> str:
    """A source without comments, docstrings and layout."""
    tree = ast.parse(text_of(path))
    for node in ast.walk(tree):
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, documented) and ast.get_docstring(node):
            node.body = node.body[1:]
    return ast.dump(tree)


@functools.cache
def _modules(path: Path, root: Path) -> frozenset[str]:
    """Dotted names of what a file imports; of `from a import b` both a and a.b, for b may be a module."""
    found = set()
    package = path.relative_to(root).parts[:-1]
    for node in ast.walk(ast.parse(text_of(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *([node.module] if node.module else [])))
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return frozenset(found)


@functools.cache
def _files_of(name: str, root: Path) -> frozenset[Path]:
    """The file of a module below a folder: a module, a package, or nothing if it is a name in a module."""
    place = root.joinpath(*name.split("."))
    return frozenset(path for path in (place.with_name(f"{place.name}.py"), place / "__init__.py") if path.is_file())


def _follows(path: Path, package: Path) -> bool:
    return package / FOLLOWED in path.parents or package not in path.parents


def _root(path: Path) -> Path:
    """The folder that a file is imported from: the parent of its topmost package."""
    folder = path.parent
    while (folder / "__init__.py").is_file():
        folder = folder.parent
    return folder


def _own(name: str, path: Path, root: Path) -> bool:
    """Whether a module belongs to a method's file from outside: in its package, or in its folder."""
    if root != path.parent:
        return name.split(".")[0] == path.relative_to(root).parts[0]
    return str(root) not in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
