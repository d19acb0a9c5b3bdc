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
    "run": {"pdrop.cli.run"},
    "pdrop.__main__": {"pdrop.cli.run"},
    "pdrop.cli.run": {"pdrop.cli.compose", "pdrop.runs", "pdrop.cli.choices", "pdrop.names"},
    "pdrop.cli.train": {"pdrop.cli.compose", "pdrop.cli.run", "pdrop.training", "pdrop.models.checkpoint"},
    "pdrop.cli.lmms_command": {"pdrop.cli.compose", "pdrop.evaluation.lmms", "pdrop.record", "pdrop.evaluation"},
    "pdrop.cli.compose": CORE | {"pdrop.runs.settings", "pdrop.evaluation"},
    "pdrop.cli.choices": set(),
    "pdrop.names": set(),
    "pdrop.store": set(),
    "pdrop.runs": CORE
    | {"pdrop.evaluation.lmms", "pdrop.evaluation", "pdrop.models.checkpoint", "pdrop.cost.flops", "pdrop.timing.paired"}
    | {"pdrop.runs.settings", "pdrop.environment", "pdrop.cost.breakdown", "pdrop.runs.timed", "pdrop.runs.timed_prompt"},
    "pdrop.cost.budget": CORE | {"pdrop.cost.flops"},
    "pdrop.cost.training": {"pdrop.cost.flops", "pdrop.shapes"},
    "pdrop.cost.breakdown": CORE | {"pdrop.cost.flops", "pdrop.cost.training"},
    "pdrop.models.shipped": {"pdrop.shapes"},
    "pdrop.runs.timed": CORE
    | {"pdrop.runs.settings", "pdrop.timing.measure", "pdrop.timing.paired", "pdrop.runs.timed_prompt", "pdrop.models.checkpoint"},
    "pdrop.pictures": set(),
    "pdrop.runs.timed_prompt": CORE | {"pdrop.models.shipped", "pdrop.models.checkpoint", "pdrop.models.source", "pdrop.evaluation"},
    "pdrop.timing.measure": CORE | {"pdrop.timing.paired", "pdrop.timing.conditions", "pdrop.timing.memory", "pdrop.timing.timeline"},
    "pdrop.timing.conditions": {"pdrop.record"},
    "pdrop.timing.memory": set(),
    "pdrop.timing.timeline": set(),
    "pdrop.models.source": {"pdrop", "pdrop.models.shipped", "pdrop.shapes", "pdrop.models.checkpoint", "pdrop.models.weights"},
    "pdrop.runs.settings": CORE
    | {"pdrop.timing.paired", "pdrop.environment", "pdrop.identity", "pdrop.models.source", "pdrop.evaluation"}
    | {"pdrop.models.checkpoint", "pdrop.cost.budget", "pdrop.runs.timed", "pdrop.runs.timed_prompt"},
    "pdrop.evaluation.lmms": CORE | {"pdrop.evaluation", "pdrop.models.checkpoint"},
    "pdrop.evaluation": CORE | {"pdrop.models.checkpoint"},
    "train": {"pdrop.cli.train"},
    "pdrop.training": CORE
    | {"pdrop.models.checkpoint", "pdrop.environment", "pdrop.identity", "pdrop.cost.training", "pdrop.evaluation"}
    | {"pdrop.timing.memory", "pdrop.models.weights"},
    "bench": CORE | {"pdrop.timing.conditions", "pdrop.methods.sparsevlm_schedules", "pdrop.cost.flops", "pdrop.timing.paired", "pdrop.environment"},
    "bench_training": CORE
    | {"pdrop.timing.paired", "pdrop.environment", "pdrop.training"}
    | {"pdrop.cost.training", "pdrop.embedded"},
    "pdrop.timing.paired": CORE,
    "pdrop.cost.flops": CORE,
    "pdrop.cost.counters": set(),
    "pdrop.conformance": CORE | {"pdrop.cost.flops", "pdrop.cost.counters", "pdrop.cli.compose"},
    "pdrop.shapes": {"pdrop.schedule"},
    "pdrop.models.sizes": {"pdrop.shapes"},  # its old name
    "pdrop.models.checkpoint": {"pdrop.record", "pdrop.models.weights"},
    "pdrop.models.weights": {"pdrop", "pdrop.names"},
    "pdrop.engine": {"pdrop.methods", "pdrop.schedule"},
    "pdrop.methods": {"pdrop.schedule", "pdrop.methods.sparsevlm_schedules", "pdrop.shapes"},
    "pdrop.schedule": set(),
    "pdrop.methods.sparsevlm_schedules": {"pdrop.schedule"},
    "pdrop.record": {"pdrop", "pdrop.names", "pdrop.store"},
    "pdrop.samples": {"pdrop.record", "pdrop.store"},
    "pdrop.identity": set(),
    "pdrop.environment": {"pdrop.identity"},
    "pdrop.embedded": set(),
}
# analysis knows records alone, by relative imports (installed, it is pdrop.analysis); wings use those named before them
CONTRACTS = {"pdrop.pictures", "pdrop.record", "pdrop.samples", "pdrop.schedule", "pdrop.names", "pdrop.store", "pdrop"}
GROUND = {"analysis.drawing", "analysis.neutral", "analysis.statistics", "analysis.grid", "analysis.style"}
WINGS = ("store", "comparison", "tables", "studies", "overlays", "report", "__main__")
FLOORS |= {"analysis": set()} | {name: CONTRACTS | {"analysis.neutral"} for name in GROUND}
FLOORS |= {
    f"analysis.{name}": CONTRACTS | GROUND | {f"analysis.{lower}" for lower in WINGS[:number]}
    for number, name in enumerate(WINGS)
}

RECORDS = {("pdrop", "scoring"), ("pdrop", "training"), ("pdrop", "record.py"), ("pdrop", "evaluate.py")}

# outside packages that have one home
HOMES = {
    "hydra": {"pdrop/cli/compose.py", "pdrop/cli/choices.py", "pdrop/cli/run.py", "pdrop/cli/train.py"},
    "omegaconf": {"pdrop/cli/compose.py", "pdrop/cli/train.py"},
    "lmms_eval": {"pdrop/evaluation/lmms.py", "pdrop/embedded/tasks/scoring.py"},
    "av": {"pdrop/evaluation/"},
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
        "import sys; import pdrop, pdrop.cli.run, pdrop.schedule, pdrop.record; "
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
