"""Every fault of pdrop/conformance/faults.py is caught by the check that it names, and by that check's own finding.

pytest tests/conformance
"""

from __future__ import annotations

import pytest

from pdrop.conformance.faults import FAULTS, HALVES, Fault
from pdrop.conformance.suite import CHECKS, Subject, run
from pdrop.methods.fastv import FastV
from pdrop.methods.pyramiddrop import PyramidDrop


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.name}: {fault.caught_by}".replace(" ", "-"))
def test_every_fault_is_caught(fault: Fault) -> None:
    (check,) = [check for check in CHECKS if check.name == fault.caught_by]
    found = list(run(fault.subject, [fault.family], checks=[check]))
    assert any(result.outcome == "failed" for result in found), f"{fault.name} passes: {check.name}"


def test_every_check_is_tried_by_a_fault() -> None:
    assert {fault.caught_by for fault in FAULTS} <= {check.name for check in CHECKS}
    untried = {check.name for check in CHECKS} - {fault.caught_by for fault in FAULTS}
    assert not untried, f"no fault shows that these checks bite: {untried}"


@pytest.mark.parametrize("method", [PyramidDrop(), FastV(several=True)])
def test_what_the_faults_are_made_of_is_sound(method: PyramidDrop | FastV) -> None:
    found = list(run(Subject("sound", method, lambda layers: HALVES), ["llava"]))
    assert [result for result in found if result.outcome == "failed"] == []
