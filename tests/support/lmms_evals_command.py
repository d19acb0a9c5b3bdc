"""lmms-eval's own command line with `--model pdrop`, in a process of its own.

scores, lines = lmms_evals_command(tmp_path, "pretrained=...,method=fastv,device=cpu", "pope", folder)
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.processes import begun

ROOT = Path(__file__).resolve().parents[2]


def module(name: str, site: Path) -> None:
    """`python -m NAME` with a folder on the import path, also of the processes that it starts."""
    sys.path.insert(0, str(site))
    os.environ["PYTHONPATH"] = f"{site}{os.pathsep}{ROOT}"
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def lmms_evals_command(
    folder: Path, arguments: str, task: str, tasks: Path, more: Sequence[str] = (), launcher: Sequence[str] = ()
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The scores of a task by `metric,filter`, and its logged samples.

    Args:
        folder: Where the command runs.
        arguments: Its --model_args.
        task: The task's name.
        tasks: The folder with its file.
        more: Further words of the command.
        launcher: The words of `python -m` in front of it, such as accelerate's.
    """
    metadata = folder / "site" / "pdrop-0.dist-info"  # what an installed pdrop has: its entry point
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: pdrop\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text("[lmms_eval.models]\npdrop = pdrop.evaluation.lmms:manifest\n")
    command = [*launcher, "lmms_eval", "--model", "pdrop", "--model_args", arguments, "--tasks", task]
    command += ["--include_path", str(tasks), "--log_samples", "--output_path", str(folder / "out"), *more]
    done = begun(module, folder, command, command[0], metadata.parent)
    done.join()
    said = (folder / "said.txt").read_text()[-3000:]
    assert done.exitcode == 0, said
    found = list((folder / "out").rglob("*_results.json"))
    assert found, said
    lines = [json.loads(x) for path in (folder / "out").rglob(f"*samples_{task}.jsonl") for x in path.open()]
    return json.loads(found[0].read_text())["results"][task], lines
