"""The checks, the models that they run on, and their results."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pdrop.conformance import behaviour, numbers, views
from pdrop.conformance.families import CORE, FAMILIES, MERGED_TOWERS, READ_TOWERS
from pdrop.conformance.subject import NotApplicable, Subject, Unmet
from pdrop.engine.tower import NoRuleForTower, UnknownTower

__all__ = ["CHECKS", "Check", "NotApplicable", "Result", "Subject", "run"]

Outcome = Literal["ok", "failed", "not applicable"]
Made = Callable[[Subject, str, str], None]  # subject, family, backend


@dataclass(frozen=True)
class Check:
    """One promise, and the models on which it is checked.

    Attributes:
        name: The promise in words.
        made: The function that raises if it is broken.
        families: "one" (LLaVA), "core" or "all".
        backends: Attention backends.
    """

    name: str
    made: Made
    families: Literal["one", "core", "all"] = "core"
    backends: tuple[str, ...] = ("sdpa",)


BOTH = ("sdpa", "eager")
CHECKS = (
    Check("nothing dropped at keep 1, to the bit", behaviour.identity, "core", BOTH),
    Check("as many tokens as it says, in every layer and in the cache", numbers.counts, "all", BOTH),
    Check("it is shown what the model computes", views.shown, "core"),
    Check("made tokens stand where it says", views.placed, "core"),
    Check("text is never dropped", numbers.text_stays, "all"),
    Check("the best of its own ranking, in their order", numbers.order, "all"),
    Check("no token sees a later one", behaviour.causal, "core", BOTH),
    Check("a prompt in a batch gets what it gets alone, padded left or right", behaviour.alone, "all"),
    Check("a forward and cached decoding are the oracle's", behaviour.decoding, "core", BOTH),
    Check("positions as declared, in the prompt and after it", behaviour.positions, "core"),
    Check("the same seed, the same tokens", numbers.seeds, "one"),
    Check("gradients flow, and the loss is the same in training", behaviour.gradients, "one"),
    Check("FLOPs and KV bytes in closed form are those measured", numbers.cost, "one"),
    Check("leaves nothing behind, also after an exception", behaviour.detaches, "one"),
)


@dataclass(frozen=True)
class Result:
    """What one check found on one model."""

    check: str
    family: str
    backend: str
    outcome: Outcome
    message: str
    seconds: float


def run(
    subject: Subject,
    families: Sequence[str] | None = None,
    backends: Sequence[str] | None = None,
    checks: Sequence[Check] = CHECKS,
) -> Iterator[Result]:
    """Make the checks.

    Args:
        subject: The method, its schedule, and the engine (pdrop's own, except in tests of the checks).
        families: Only these of each check's families.
        backends: Only these of each check's backends.
        checks: Only these checks.
    """
    for check in checks:
        wanted = {"one": ["llava"], "core": CORE, "all": list(FAMILIES)}[check.families]
        for family in [name for name in wanted if families is None or name in families]:
            for backend in [name for name in check.backends if backends is None or name in backends]:
                yield judge(check, subject.on(family), family, backend)


def judge(check: Check, subject: Subject, family: str, backend: str) -> Result:
    """Make one check on one model. Any failure is a finding, including an exception of the method or the engine."""
    started = time.perf_counter()
    result = Result(check.name, family, backend, "ok", "", 0.0)
    found: Any = {}
    try:
        check.made(subject, family, backend)
    except NotApplicable as reason:
        found = {"outcome": "not applicable", "message": str(reason)}
    except NoRuleForTower as reason:
        found = {"outcome": "not applicable", "message": str(reason)}
    except UnknownTower as reason:
        outcome = "failed" if family in READ_TOWERS + MERGED_TOWERS else "not applicable"
        found = {"outcome": outcome, "message": str(reason)}
    except Unmet as error:
        found = {"outcome": "failed", "message": str(error)}
    except Exception as error:
        found = {"outcome": "failed", "message": f"{type(error).__name__}: {error}"}
    return replace(result, seconds=time.perf_counter() - started, **found)
