"""The rules of the house, held by reading the code: floors, homes, sizes, names, hooks. CONTRIBUTING.md says them."""

import ast
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LONGEST_FILE, LONGEST_FUNCTION = 500, 60  # lines; a function's docstring is not counted
FOLDERS = ("pdrop", "analysis", "benchmarks", "recipes")
SOURCES = sorted([p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")] + list(ROOT.glob("*.py")))

# From the ground up. A file imports from lower floors and from its own folder, nothing else of the house.
FLOORS = (
    {"contracts"},
    {"methods"},
    {"engine"},
    {"models", "cost"},
    {"timing", "evaluation", "conformance"},
    {"runs"},
    {"training"},
    {"cli"},
    {"benchmarks", "recipes"},
)
# Besides: what is shipped as data and code of tasks imports nothing, and whoever trains or times the embedded model
# may read it; the analysis reads records, so it sees contracts alone; the doors at the root only open.
BESIDES = {
    "public names": set(),
    "embedded": set(),
    "analysis": {"contracts"},
    "doors": {"cli"},
}
READERS_OF_EMBEDDED = {"benchmarks", "recipes"}

# outside packages that have one home
HOMES = {
    "hydra": {"pdrop/cli/"},
    "omegaconf": {"pdrop/cli/"},
    "lmms_eval": {
        "pdrop/evaluation/lmms.py",
        "pdrop/embedded/tasks/scoring.py",
        "benchmarks/bench_evaluation.py",
        "pdrop/evaluation/tasks/benchmarks.py",
    },
    "av": {"pdrop/evaluation/"},
    "pandas": {"analysis/"},
    "matplotlib": {"analysis/", "pdrop/embedded/"},
}


def each(rule: Callable[[Path], None]) -> Callable[[], None]:
    """A test that holds a rule for every source and names all that break it; a test per file would cost more."""

    def test() -> None:
        broken = []
        for path in SOURCES:
            try:
                rule(path)
            except AssertionError as error:
                broken.append(f"{path.relative_to(ROOT)}: {str(error).splitlines()[0]}")
        if broken:
            pytest.fail("\n".join(broken), pytrace=False)

    test.__name__, test.__doc__ = rule.__name__, rule.__doc__
    return test


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = node.level - (path.stem == "__init__")  # `from .x import y`
            names = name_of(path).split(".")
            package = ".".join([*(names[: len(names) - up] if node.level else []), node.module or ""]).strip(".")
            # `from pdrop import x` is the module x where there is one, and a public name otherwise
            found |= {
                f"{package}.{alias.name}" if is_module(f"{package}.{alias.name}") else package for alias in node.names
            }
    return found


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def room(module: str) -> str:
    """The folder of the house that a module belongs to; files beside the folders of pdrop/ are the contracts."""
    names = module.split(".")
    if names[0] != "pdrop":
        return names[0] if names[0] in FOLDERS else "doors"
    if len(names) == 1:
        return "public names"
    return names[1] if (ROOT / "pdrop" / names[1]).is_dir() else "contracts"


def below(home: str) -> set[str]:
    """What a room may import, itself included."""
    for height, floor in enumerate(FOLDERS_BY_FLOOR):
        if home in floor:
            lower = set().union(*FOLDERS_BY_FLOOR[:height])
            return lower | {home} | ({"embedded"} if home in READERS_OF_EMBEDDED else set())
    return BESIDES[home] | {home}


FOLDERS_BY_FLOOR = FLOORS


@each
def test_imports_go_down_only(path):
    module = name_of(path)
    used = {room(m) for m in imports(path) if m.split(".")[0] in ("pdrop", *FOLDERS)}
    if module == "pdrop":
        assert not used, "import pdrop must cost nothing"
        return
    if path.name == "__main__.py":  # a door, which may compose what is asked for
        used -= {"cli"}
    home = room(module)
    assert any(home in floor for floor in FLOORS) or home in BESIDES, f"{home} is a new folder: give it a floor"
    # the public names are reached through `pdrop` from the engine's floor on, where their homes are
    allowed = below(home) | ({"public names"} if home not in ("contracts", "methods", "analysis") else set())
    assert used <= allowed, f"{module} may not import {sorted(used - allowed)}"


@each
def test_outside_packages_have_one_home(path):
    where = path.relative_to(ROOT).as_posix()
    for package, homes in HOMES.items():
        if package in {m.split(".")[0] for m in imports(path)}:
            assert any(where == home or (home.endswith("/") and where.startswith(home)) for home in homes), (
                f"{where} imports {package}, whose home is {homes}"
            )


@each
def test_the_contracts_need_the_standard_library_alone(path):
    if room(name_of(path)) == "contracts" and path.name not in (
        "pictures.py",
        "thumbnails.py",
    ):  # these are about Pillow's
        outside = {m.split(".")[0] for m in imports(path)} - sys.stdlib_module_names - {"pdrop"}
        assert not outside, f"{path.name} imports {outside}"


@each
def test_files_and_functions_can_be_read(path):
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST_FILE, f"{path}: split it by subject"
    assert path.stem not in ("utils", "util", "common", "helpers", "helper", "misc"), "a drawer: give each thing a home"
    for node in ast.walk(parsed(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            said = len((ast.get_docstring(node, clean=False) or "").splitlines())
            lines = (node.end_lineno or 0) - node.lineno + 1 - said
            assert lines <= LONGEST_FUNCTION, f"{path}:{node.lineno}: {node.name} has {lines} lines: more than a screen"


def test_a_public_class_name_exists_once():
    found = defaultdict(set)
    for path in SOURCES:
        for node in parsed(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].add(str(path.relative_to(ROOT)))
    twice = {name: sorted(paths) for name, paths in found.items() if len(paths) > 1}
    assert not twice, f"one word, one thing: {twice}"


@each
def test_modules_and_classes_are_documented(path):
    tree = parsed(path)
    if path.read_text().strip():
        assert ast.get_docstring(tree), f"{path}: no module docstring"
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"


@each
def test_a_docstring_says_what_the_name_does_not(path):
    """A function needs none; one of three words is none, unless it gives a shape."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (said := ast.get_docstring(node)):
            assert len(said.split()) > 3 or re.search(r"[\[(]", said), f"{path}:{node.lineno}: {node.name}: {said!r}"


@each
def test_files_that_sources_name_exist(path):
    named = set(re.findall(r"(?<![\w/.-])(?:pdrop|analysis|benchmarks|recipes|tests)/[\w/]+\.py\b", path.read_text()))
    assert not (gone := sorted(name for name in named if not (ROOT / name).is_file())), f"no such file: {gone}"


@each
def test_hooks_live_in_one_place(path):
    # the conformance suite looks at models from outside, the probe at one of its own; prefills in step change nothing
    if path.name not in ("hooks.py", "probe.py", "in_step.py") and "conformance" not in path.parts:
        assert not re.search(r"register_\w*hook", path.read_text()), "hooks live in pdrop/engine/hooks.py"


@each
def test_nothing_fails_in_silence(path):
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            silent = all(isinstance(statement, (ast.Pass, ast.Continue)) for statement in node.body)
            assert node.type is not None and not silent, f"{path}:{node.lineno}: except {caught} hides a failure"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), f"{path}:{node.lineno}: {node.func.id}"


@each
def test_records_are_read_by_lines_that_end_at_newlines(path):
    where = path.relative_to(ROOT).as_posix()
    if where.startswith(("analysis/", "pdrop/evaluation/", "pdrop/training/", "pdrop/record.py", "pdrop/samples.py")):
        assert "splitlines" not in path.read_text(), "it also cuts at U+2028 and the like, which are text: read_lines"


@each
def test_code_of_a_checkpoint_is_never_run(path):
    """Every Auto* class of transformers says so: without the word it asks on the terminal, and `y` runs the code."""
    for node in ast.walk(parsed(path)):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if re.search(r"(?i:^auto\w*)\.from_(pretrained|config)$", called):
            assert isinstance(node, ast.Call)
            said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert said.get("trust_remote_code") == "False", f"{path}:{node.lineno}: {called}(trust_remote_code=False)"


def test_importing_pdrop_and_composing_help_is_light():
    code = (
        "import sys; import pdrop, pdrop.cli.run, pdrop.cli.train, pdrop.schedule, pdrop.record; "
        "heavy = {'torch', 'transformers', 'lmms_eval', 'pandas', 'matplotlib'} & set(sys.modules); "
        "sys.exit(f'imports {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_package_is_shipped():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {p.parent for folder in ("pdrop", "analysis") for p in (ROOT / folder).rglob("*.py")}
    packages = {".".join(folder.relative_to(ROOT).parts).replace("analysis", "pdrop.analysis", 1) if
                folder.relative_to(ROOT).parts[0] == "analysis" else ".".join(folder.relative_to(ROOT).parts)
                for folder in folders}  # fmt: skip
    missing = {p for p in packages if p not in settings["packages"] and not p.endswith(".tasks")}  # as data
    assert not missing, f"pyproject.toml does not ship {sorted(missing)}"
    assert not {p for p in settings["packages"] if p.split(".")[0] != "pdrop"}, "the wheel installs pdrop alone"


def test_pages_fit_into_120_columns():
    """Outside of tables and blocks of code. results/ is rendered."""
    within = (page for folder in ("docs", "pdrop", "recipes", "tests") for page in (ROOT / folder).rglob("*.md"))
    long = []
    for page in [*ROOT.glob("*.md"), *sorted(within)]:
        for number, text in enumerate(page.read_text(encoding="utf8").split("```")[::2]):  # every second part is code
            lines = [line for line in text.splitlines() if not line.startswith("|") and " " in line.strip()]
            long += [f"{page.relative_to(ROOT)}, text {number}: {line[:60]}..." for line in lines if len(line) > 120]
    assert not long, "\n".join(long)
