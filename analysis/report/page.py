"""The report: one HTML page with tables, figures, samples and the record of each number.

    python -m analysis report [--images PATH] [--samples N]       results/report.html (make report)

It opens from file:// and loads nothing: a Content-Security-Policy allows its own script and style by their hashes, and
pictures inside the page, nothing else. Text from records, data sets and models is JSON in the page and is shown as
text, never as markup. The figures are those of results/figures. The same input gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from pdrop.commands import typed

from ..store.load import ALL, experiments, load_runs
from .data import LINE_HEAD, experiment_data, failures, overview, run_data, show, totals
from .samples import sample_data

TEMPLATES = files(__package__)
TITLE = "pdrop: results"
FIRST = "demo"  # the experiment that is open at first, where there is one of this name
SAMPLES = 10_000  # answers that a page holds


def page(
    results: Path,
    images: Path | None = None,
    samples: int = SAMPLES,
    figures: Sequence[Path] = (),
    unreadable: list[str] | None = None,
) -> str:
    """The page.

    Args:
        results: The results folder.
        images: Where the samples' pictures are (analysis/overlays/pictures.py); None: the embedded test split.
        samples: The most answers that it holds; the first questions of each task are taken.
        figures: Folders of figures, of which the first that has a file counts; default: the store's.
        unreadable: Gets the messages about records and samples that cannot be read; the page shows them, too.

    Raises:
        ValueError: If there is no run that can be read.
    """
    bad = unreadable if unreadable is not None else []
    runs = load_runs(results, bad)
    if not runs and bad:
        raise ValueError("no run can be read")
    if not runs:
        raise ValueError(f"no run under {results / 'runs'}: start with {typed('run')}")
    shown = [show(results, name) for name in experiments(results) or [ALL]]
    data: dict[str, Any] = {
        "summary": totals(runs, shown),
        "warnings": [],
        "first": next((one.name for one in shown if one.name == FIRST), shown[0].name),
        "line_head": LINE_HEAD,
        "experiments": [
            experiment_data(one, figures or [results / "figures"], [other.name for other in shown]) for one in shown
        ],
        "runs": {run.record.run_id: run_data(run) for run in runs},
        "overview": overview(runs),
        "samples": sample_data(runs, images, samples, bad),
    }
    data["warnings"] = [*dict.fromkeys(bad), *failures(runs)]
    return fill(data)


def fill(data: dict[str, Any]) -> str:
    """The template filled with style, script and data; nothing in the JSON can end the element that holds it."""
    style, script = ((TEMPLATES / f"report.{kind}").read_text(encoding="utf8") for kind in ("css", "js"))
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    values = {
        "title": TITLE,
        "style_hash": digest(style),
        "script_hash": digest(script),
        "style": style,
        "script": script,
        "data": text.replace("<", "\\u003c"),
    }
    first, *rest = (TEMPLATES / "report.html").read_text(encoding="utf8").split("{{")
    named = (piece.split("}}", 1) for piece in rest)
    return first + "".join(values[name] + after for name, after in named)


def digest(text: str) -> str:
    """The hash by which a Content-Security-Policy names an inline script or style."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
