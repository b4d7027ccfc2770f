"""GenEval's rule for relations, written out, for the tests of both editions."""

import math
from collections.abc import Callable

import pytest


def geneval_relations(a: tuple[int, ...], b: tuple[int, ...]) -> set[str]:
    """GenEval's rule in plain numbers: offsets shrunk by a tenth of both sizes, divided by the
    distance, thresholds of one half."""
    offset = [(a[i] + a[i + 2]) / 2 - (b[i] + b[i + 2]) / 2 for i in (0, 1)]
    size = [abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]) for i in (0, 1)]
    shrunk = [math.copysign(max(abs(o) - 0.1 * s, 0), o) for o, s in zip(offset, size, strict=True)]
    if all(abs(r) < 1e-3 for r in shrunk):
        return set()
    dx, dy = (r / math.hypot(*offset) for r in shrunk)
    named = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in named.items() if holds}


@pytest.fixture(name="geneval_relations", scope="session")
def _geneval_relations() -> Callable[[tuple[int, ...], tuple[int, ...]], set[str]]:
    return geneval_relations
