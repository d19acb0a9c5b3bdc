"""Every method of conf/method/ conforms, also one that was added today; its random twin too.

All checks on LLaVA, the cheap ones elsewhere; `python -m pdrop.conformance METHOD` makes all of them on every family.

pytest tests/conformance
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import pytest

from pdrop.cli.compose import choices
from pdrop.conformance import behaviour, numbers
from pdrop.conformance.__main__ import main, subject_of
from pdrop.conformance.families import CORE
from pdrop.conformance.suite import CHECKS, Check, run

METHODS = [name for name in choices("method") if name != "none"]
TWINS = [name for name in METHODS if not name.startswith("random") and name != "downsample"]
MORE = [("sparsevlm_v1", ("method.scale=1",)), ("pyramiddrop", ("positions=original", "layers=[0,2,4]"))]
SUBJECTS = [*((name, ()) for name in METHODS), *MORE]
ELSEWHERE = [check for check in CHECKS if check.families != "one" and check.made is not behaviour.identity]
OF_TWINS = [check for check in CHECKS if check.made in (numbers.counts, numbers.seeds, behaviour.alone)]


def complaints(name: str, dials: tuple[str, ...], family: str, backend: str, checks: Sequence[Check]) -> list[str]:
    """What the checks find wrong."""
    found = run(subject_of(name, dials), [family], [backend], checks)
    return [f"{r.check}, {r.family}/{r.backend}: {r.message}" for r in found if r.outcome == "failed"]


@pytest.mark.parametrize(("name", "dials"), SUBJECTS, ids=[" ".join([name, *dials]) for name, dials in SUBJECTS])
def test_a_method_conforms(name: str, dials: tuple[str, ...]) -> None:
    assert complaints(name, dials, "llava", "sdpa", CHECKS) == []
    eager = [check for check in CHECKS if check.made is behaviour.causal]
    assert complaints(name, dials, "llava", "eager", eager) == []
    others = [family for family in CORE if family != "llava"]  # another one for each method
    family = others[zlib.crc32(f"{name} {dials}".encode()) % len(others)]
    assert complaints(name, dials, family, "sdpa", ELSEWHERE) == []


@pytest.mark.parametrize("name", TWINS)
def test_its_random_twin_conforms(name: str) -> None:
    dials = ("twin=true", "method.scale=1") if name == "sparsevlm_v1" else ("twin=true",)
    assert complaints(name, dials, "llava", "sdpa", OF_TWINS) == []


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fastv", "ratio=0.25", "--family", "llava"]) == 0
    said = capsys.readouterr().out
    assert "2:0.25" in said and said.count("  ok ") == len(CHECKS) and "conforms" in said
    assert main(["pdrop.conformance.broken.Lots", "--family", "llava"]) == 1
    said = capsys.readouterr().out
    assert "FAILED  the same seed, the same tokens" in said and "lost other tokens the second time" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pyramid"], "unknown method 'pyramid': choose downsample, fastv, "),
        (["none"], "nothing to check"),
        (["fastv", "ratio"], "dial=value"),
        (["fastv", "ratio=2"], "between 0 and 1"),
        (["pdrop.methods.base.View"], "without arguments"),
        (["pathlib.Path"], "is no pdrop.methods.base.Method"),
    ],
)
def test_refusals(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dial", "told"), [("ratio=[1", "ratio=[1 cannot be read"), ("foo=1", "no dial 'foo'"), ("seed=-1", "seed is")]
)
def test_dials_that_cannot_be_are_one_line(dial, told, capsys):
    assert main(["fastv", dial]) == 1
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1
