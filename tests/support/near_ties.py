"""Do two traces keep the same tokens, but for those whose scores lie at the cut? For devices, whose last digits differ.

diverged(on_gpu, on_cpu)     # the rows that parted at a near-tie; anything else is an AssertionError
"""

from __future__ import annotations

from typing import Any

NEAR = 1e-4  # of the score at the cut: what sums of another order make of float32


def diverged(got: Any, want: Any, near: float = NEAR) -> set[int]:
    """Rows of the batch that keep other tokens from some boundary on, all of them near-ties there.

    After such a boundary other tokens are in the row, so that it is not compared any further.

    Args:
        got: A trace, with `kept`, `scores` and `visual`,
        want: and another one of the same prompts.
        near: How far from the cut a score may lie, as a share of the largest score's distance from zero.
    """
    assert got.visual == want.visual and len(got.kept) == len(want.kept)
    parted: set[int] = set()
    before = [list(range(count)) for count in want.visual]
    for number, (here, there) in enumerate(zip(got.kept, want.kept)):
        for row, (mine, theirs) in enumerate(zip(here, there)):
            if row in parted:
                continue
            one, other = mine.tolist(), theirs.tolist()
            assert len(one) == len(other), f"boundary {number}, row {row}: {len(one)} tokens and {len(other)}"
            for token in set(one) ^ set(other):
                for trace, keeps in ((got, one), (want, other)):
                    gap = distance(trace.scores[number][row].tolist(), before[row], keeps, token)
                    assert gap <= near, f"boundary {number}, row {row}: token {token} is {gap:.2g} from the cut"
                parted.add(row)
            before[row] = other
    return parted


def distance(scores: list[float], ranked: list[int], keeps: list[int], token: int) -> float:
    """How far a token's score is from the other side of the cut, as a share of the largest score."""
    by_token = dict(zip(ranked, scores, strict=True))
    kept, gone = [by_token[t] for t in keeps], [by_token[t] for t in ranked if t not in set(keeps)]
    beyond = by_token[token] - max(gone) if token in keeps else min(kept) - by_token[token]
    return max(0.0, beyond) / max(map(abs, scores))
