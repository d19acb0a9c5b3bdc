"""A worker times what one process times, here or in fresh processes of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdrop.cli.compose import settings
from pdrop.runs import workers
from pdrop.runs.run import run

pytest.importorskip("ray")
pytestmark = pytest.mark.exhaustive


def test_a_worker_times_a_run(tmp_path: Path) -> None:
    dials = {"tasks": ["embedded_counting"], "limit": 4, "device": "cpu", "workers": 1, "results": str(tmp_path)}
    quick = run(settings({**dials, "latency": "quick", "latency.pairs": 2, "latency.warmup": 1}))
    short = {"latency.pairs": 1, "latency.warmup": 1, "latency.repeats": 2, "latency.new_tokens": [1]}
    short |= {"latency.min_seconds": 0.1, "latency.steady": 1.0}
    full = run(settings({**dials, "latency": "full", **short}))
    workers.dismiss()
    assert quick.cost is not None and full.cost is not None
    assert quick.cost.prefill_ms is not None and quick.cost.prefill_ms.median > 0
    for record in (quick, full):  # both with the conditions that they were measured under
        assert record.cost.timing is not None and record.cost.timing["stages"]["prefill"]["this"]["median"] > 0
    assert len(full.environment["answered_by"]) == 1, "the worker answers again after it was timed"
