"""Windows: half-open bands of noise levels, or parts of the steps that round down."""

import math
from dataclasses import dataclass

import pytest

from diffalign.core import StepInfo, Technique, Windowed, errors, option
from diffalign.core.window import never_acted


@dataclass(frozen=True, slots=True)
class Always(Windowed, Technique):
    """Acts at every step."""


@dataclass(frozen=True, slots=True)
class Middle(Windowed, Technique):
    """Acts in the middle."""

    start: float = option(0.25, "first step", low=0.0, high=1.0)
    stop: float = option(0.75, "end", low=0.0, high=1.0)


def steps(technique, count):
    return [i for i in range(count) if technique.active(StepInfo(i, count, 0.5))]


def test_a_band_is_half_open():
    band = Always(sigma=(0.2, 1.6))
    levels = (0.19, 0.2, 1.59, 1.6)
    assert [band.active(StepInfo(0, 4, level)) for level in levels] == [False, True, True, False]
    assert Always(sigma=(0.0, math.inf)).active(StepInfo(0, 4, 1e9))


@pytest.mark.parametrize(
    ("start", "stop", "count", "acting"),
    [
        (0.0, 1.0, 3, [0, 1, 2]),
        (0.0, 0.5, 5, [0, 1]),
        (0.3, 0.7, 10, [3, 4, 5, 6]),  # 0.3 * 10 is 2.9999...: rounding must not lose a step
        (0.8, 1.0, 5, [4]),
        (0.0, 0.1, 5, []),
    ],
)
def test_fractions_of_steps_round_down(start, stop, count, acting):
    assert steps(Always(start=start, stop=stop), count) == acting


def test_a_band_replaces_a_default_part_of_the_steps():
    assert steps(Middle(), 8) == [2, 3, 4, 5]
    assert steps(Middle(sigma=(0.0, 1.0)), 8) == list(range(8))
    assert steps(Middle(sigma=(0.0, 1.0), start=0.0, stop=1.0), 8) == list(range(8))
    with pytest.raises(ValueError, match="not both"):
        Middle(sigma=(0.0, 1.0), start=0.5)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"sigma": (2.0, 1.0)}, ValueError, "0 <= lo < hi"),
        ({"sigma": (1.0, 1.0)}, ValueError, "0 <= lo < hi"),
        ({"sigma": (-1.0, 1.0)}, ValueError, "at least 0"),
        ({"sigma": 3.0}, TypeError, "2 values"),
        ({"start": 0.6, "stop": 0.5}, ValueError, "start < stop"),
        ({"start": -0.1}, ValueError, r"in \[0, 1\]"),
        ({"stop": 1.1}, ValueError, r"in \[0, 1\]"),
        ({"sigma": (0.1, 1.0), "start": 0.1}, ValueError, "not both"),
    ],
)
def test_bad_windows_are_refused(options, error, text):
    with pytest.raises(error, match=f"Always.*{text}"):
        Always(**options)


def test_whether_any_step_of_a_run_is_inside():
    assert Always(sigma=(0.5, 1.0)).acts_in({0: 2.0, 1: 0.7}, 2)
    assert not Always(sigma=(0.5, 0.6)).acts_in({0: 2.0, 1: 0.7}, 2)
    errors._WARNED.clear()
    with pytest.warns(UserWarning, match=r"sigma=\(0, inf\) acts at every step"):
        assert "none of this run's 2 steps (noise levels 2 to 0.7)" in never_acted(
            "X", {0: 2.0, 1: 0.7}
        )
