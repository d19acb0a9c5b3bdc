"""The rules of the house, held by reading the code: floors, homes, sizes, names, hooks."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 400  # lines of a file that is read in one sitting
FOLDERS = ("pdrop", "analysis")
SOURCES = sorted([p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")] + [p for p in ROOT.glob("*.py")])

# Imports go down only: a part may import those named after it. `methods` and `engine` know nothing of measuring.
CORE = {"pdrop", "pdrop.engine", "pdrop.methods", "pdrop.schedule", "pdrop.record", "pdrop.shapes"} | {
    "pdrop.names",
    "pdrop.store",
    "pdrop.pictures",
    "pdrop.samples",
}
FLOORS = {
    "run": {"pdrop.run"},
    "pdrop.__main__": {"pdrop.run"},
    "pdrop.run": {"pdrop.compose", "pdrop.runs", "pdrop.choices", "pdrop.names"},
    "pdrop.train": {"pdrop.compose", "pdrop.run", "pdrop.training"},
    "pdrop.lmms_command": {"pdrop.compose", "pdrop.evaluate", "pdrop.record", "pdrop.scoring"},
    "pdrop.compose": CORE | {"pdrop.settings", "pdrop.scoring"},
    "pdrop.choices": set(),
    "pdrop.names": set(),
    "pdrop.store": set(),
    "pdrop.runs": CORE
    | {"pdrop.evaluate", "pdrop.scoring", "pdrop.checkpoint", "pdrop.flops", "pdrop.latency"}
    | {"pdrop.settings", "pdrop.environment", "pdrop.ledger", "pdrop.speed", "pdrop.timed_prompt"},
    "pdrop.budget": CORE | {"pdrop.flops"},
    "pdrop.training_flops": {"pdrop.flops", "pdrop.shapes"},
    "pdrop.ledger": CORE | {"pdrop.flops", "pdrop.training_flops"},
    "pdrop.architectures": {"pdrop.shapes"},
    "pdrop.speed": CORE
    | {"pdrop.settings", "pdrop.measure", "pdrop.latency", "pdrop.timed_prompt", "pdrop.checkpoint"},
    "pdrop.pictures": set(),
    "pdrop.timed_prompt": CORE | {"pdrop.architectures", "pdrop.checkpoint", "pdrop.source", "pdrop.scoring"},
    "pdrop.measure": CORE | {"pdrop.latency", "pdrop.conditions", "pdrop.memory", "pdrop.timeline"},
    "pdrop.conditions": {"pdrop.record"},
    "pdrop.memory": set(),
    "pdrop.timeline": set(),
    "pdrop.source": {"pdrop", "pdrop.architectures", "pdrop.shapes", "pdrop.checkpoint", "pdrop.weights"},
    "pdrop.settings": CORE
    | {"pdrop.latency", "pdrop.environment", "pdrop.identity", "pdrop.source", "pdrop.scoring"}
    | {"pdrop.checkpoint", "pdrop.budget", "pdrop.speed", "pdrop.timed_prompt"},
    "pdrop.evaluate": CORE | {"pdrop.scoring", "pdrop.checkpoint"},
    "pdrop.scoring": CORE | {"pdrop.checkpoint"},
    "train": {"pdrop.train"},
    "pdrop.training": CORE
    | {"pdrop.checkpoint", "pdrop.environment", "pdrop.identity", "pdrop.training_flops", "pdrop.scoring"}
    | {"pdrop.memory", "pdrop.weights"},
    "bench": CORE | {"pdrop.conditions", "pdrop.lists", "pdrop.flops", "pdrop.latency", "pdrop.environment"},
    "bench_training": CORE
    | {"pdrop.latency", "pdrop.environment", "pdrop.training"}
    | {"pdrop.training_flops", "pdrop.embedded"},
    "pdrop.latency": CORE,
    "pdrop.flops": CORE,
    "pdrop.counters": set(),
    "pdrop.calibrate": CORE,
    "pdrop.conformance": CORE | {"pdrop.flops", "pdrop.counters", "pdrop.compose"},
    "pdrop.shapes": {"pdrop.schedule"},
    "pdrop.sizes": {"pdrop.shapes"},  # its old name
    "pdrop.checkpoint": {"pdrop.record", "pdrop.weights"},
    "pdrop.weights": {"pdrop", "pdrop.names"},
    "pdrop.engine": {"pdrop.methods", "pdrop.schedule"},
    "pdrop.methods": {"pdrop.schedule", "pdrop.lists", "pdrop.shapes"},
    "pdrop.schedule": set(),
    "pdrop.lists": {"pdrop.schedule"},
    "pdrop.record": {"pdrop", "pdrop.names", "pdrop.store"},
    "pdrop.samples": {"pdrop.record", "pdrop.store"},
    "pdrop.identity": set(),
    "pdrop.environment": {"pdrop.identity"},
    "pdrop.embedded": set(),
}
# analysis knows records alone, by relative imports (installed, it is pdrop.analysis); wings use those named before them
CONTRACTS = {"pdrop.pictures", "pdrop.record", "pdrop.samples", "pdrop.schedule", "pdrop.names", "pdrop.store", "pdrop"}
GROUND = {"analysis.neutral", "analysis.statistics", "analysis.grid", "analysis.style"}
WINGS = ("store", "comparison", "tables", "studies", "overlays", "report", "__main__")
FLOORS |= {"analysis": set()} | {name: CONTRACTS | {"analysis.neutral"} for name in GROUND}
FLOORS |= {
    f"analysis.{name}": CONTRACTS | GROUND | {f"analysis.{lower}" for lower in WINGS[:number]}
    for number, name in enumerate(WINGS)
}

RECORDS = {("pdrop", "scoring"), ("pdrop", "training"), ("pdrop", "record.py"), ("pdrop", "evaluate.py")}

# outside packages that have one home
HOMES = {
    "hydra": {"pdrop/compose.py", "pdrop/choices.py", "pdrop/run.py", "pdrop/train.py"},
    "omegaconf": {"pdrop/compose.py", "pdrop/train.py"},
    "lmms_eval": {"pdrop/evaluate.py", "pdrop/embedded/tasks/scoring.py"},
    "av": {"pdrop/scoring/"},
    "pandas": {"analysis/"},
    "matplotlib": {"analysis/", "pdrop/embedded/"},
}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = node.level - (path.stem == "__init__")  # `from .x import y`
            names = name_of(path).split(".")
            package = names[: len(names) - up] if node.level else []
            found.add(".".join([*package, node.module or ""]).rstrip("."))
    return found


def part(module: str) -> str:
    """The part of the house that a module belongs to: its first two names."""
    names = module.split(".")
    return ".".join(names[:2]) if names[0] in FOLDERS else names[0]


def test_analysis_imports_itself_relatively():
    for path in (ROOT / "analysis").rglob("*.py"):
        tree = ast.parse(path.read_text())
        absolute = [
            node.lineno
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "analysis"
        ]
        assert not absolute, f"{path}:{absolute}: installed, this package is pdrop.analysis"


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", SOURCES, ids=[str(p.relative_to(ROOT)) for p in SOURCES])
def test_imports_go_down_only(path):
    module = name_of(path)
    if module == "pdrop":
        assert not {m for m in imports(path) if m.startswith("pdrop")}, "import pdrop must cost nothing"
        return
    home = part(module)
    assert home in FLOORS, f"{home} is a new part: give it a floor in FLOORS"
    used = {part(m) for m in imports(path) if m.split(".")[0] in ("pdrop", *FOLDERS)} - {home}
    assert used <= FLOORS[home], f"{module} may not import {sorted(used - FLOORS[home])}"


@pytest.mark.parametrize("path", SOURCES, ids=[str(p.relative_to(ROOT)) for p in SOURCES])
def test_outside_packages_have_one_home(path):
    where = path.relative_to(ROOT).as_posix()
    for package, homes in HOMES.items():
        if package in {m.split(".")[0] for m in imports(path)}:
            assert any(where == home or (home.endswith("/") and where.startswith(home)) for home in homes), (
                f"{where} imports {package}, whose home is {homes}"
            )


@pytest.mark.parametrize("path", SOURCES, ids=[str(p.relative_to(ROOT)) for p in SOURCES])
def test_files_can_be_read_in_one_sitting(path):
    lines = len(path.read_text().splitlines())
    assert lines <= LONGEST, f"{lines} lines: split it by subject"
    assert path.stem not in ("utils", "util", "common", "helpers", "helper", "misc"), "a drawer: give each thing a home"


@pytest.mark.parametrize("path", SOURCES, ids=[str(p.relative_to(ROOT)) for p in SOURCES])
def test_modules_and_public_names_are_documented(path):
    tree = ast.parse(path.read_text())
    if path.read_text().strip():
        assert ast.get_docstring(tree), f"{path}: no module docstring"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"


@pytest.mark.parametrize("path", SOURCES, ids=[str(p.relative_to(ROOT)) for p in SOURCES])
def test_hooks_live_in_one_place(path):
    # the conformance suite looks at models from outside, the probe at one of its own
    if path.name not in ("hooks.py", "probe.py") and "conformance" not in path.parts:
        assert not re.search(r"register_\w*hook", path.read_text()), "hooks live in pdrop/engine/hooks.py"


@pytest.mark.parametrize("path", SOURCES, ids=[str(p.relative_to(ROOT)) for p in SOURCES])
def test_code_of_a_checkpoint_is_never_run(path):
    # without a word about it, transformers asks on the terminal, and "y" runs it
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value)
            if node.func.attr in ("from_pretrained", "from_config") and owner.lower().startswith("auto"):
                said = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert said.get("trust_remote_code") == "False", f"{path}:{node.lineno}: trust_remote_code=False"


@pytest.mark.parametrize("path", SOURCES, ids=[str(p.relative_to(ROOT)) for p in SOURCES])
def test_nothing_fails_in_silence(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            silent = all(isinstance(statement, (ast.Pass, ast.Continue)) for statement in node.body)
            assert node.type is not None and not silent, f"{path}:{node.lineno}: except {caught} hides a failure"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), f"{path}:{node.lineno}: {node.func.id}"


def test_importing_pdrop_and_composing_help_is_light():
    code = (
        "import sys; import pdrop, pdrop.run, pdrop.schedule, pdrop.record; "
        "heavy = {'torch', 'transformers', 'lmms_eval', 'pandas', 'matplotlib'} & set(sys.modules); "
        "sys.exit(f'imports {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_package_is_shipped():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {p.parent for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    packages = {f"pdrop.{name}" if name.split(".")[0] == "analysis" else name for name in names}
    assert all(name.split(".")[0] == "pdrop" for name in settings["packages"]), "a wheel puts pdrop on the import path"
    missing = {p for p in packages if p not in settings["packages"] and p != "pdrop.embedded.tasks"}
    assert not missing, f"pyproject.toml does not ship {sorted(missing)}"


@pytest.mark.parametrize("path", SOURCES, ids=[str(p.relative_to(ROOT)) for p in SOURCES])
def test_records_are_read_by_lines_that_end_at_newlines(path):
    if path.relative_to(ROOT).parts[:2] in RECORDS or path.relative_to(ROOT).parts[0] == "analysis":
        assert "splitlines" not in path.read_text(), "it also cuts at U+2028 and the like, which are text: read_lines"
