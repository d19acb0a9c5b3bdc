"""Numbers as text for cells: fractions in %, differences in points, intervals, p values."""

from __future__ import annotations

from ..grid import DASH
from ..statistics import Estimate


def percent(value: float | None) -> str:
    """A fraction in %, one decimal."""
    return DASH if value is None else minus(f"{100 * value:.1f}")


def signed(difference: Estimate | None) -> str:
    """A difference in percentage points with its interval."""
    if difference is None:
        return DASH
    text = f"{100 * difference.value:+.1f}"
    return minus("0.0" if text in ("+0.0", "-0.0") else text) + (" " + bounds(difference) if bounds(difference) else "")


def bounds(estimate: Estimate) -> str:
    """[low, high] in %; empty without an interval."""
    if estimate.low is None or estimate.high is None:
        return ""
    low, high = (f"{100 * bound:.1f}" for bound in (estimate.low, estimate.high))
    return minus("[{}, {}]".format(*("0.0" if bound == "-0.0" else bound for bound in (low, high))))


def minus(text: str) -> str:
    """A typographic minus, which does not break from its number."""
    return text.replace("-", "−")


def probability(p: float) -> str:
    """A p value: two digits, small ones as a bound."""
    return "<0.001" if p < 0.001 else f"{p:.2g}"
