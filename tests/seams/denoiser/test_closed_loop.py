"""What reaches the scheduler is compared with the guided prediction, to the last bit or the last
few of them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from diffalign.core import GuidanceMismatch, linear_mix
from diffalign.families.arithmetic import negated
from diffalign.families.sd import SD
from diffalign.seams.denoiser import closed_loop
from diffalign.seams.denoiser.clock import Clock
from diffalign.seams.denoiser.closed_loop import ClosedLoop

EPS = torch.finfo(torch.float32).eps
ONES = torch.ones(1, 1, 2, 2)


class Odd:
    """Stands for a pipeline; errors name it."""


def loop(family=SD, step=0):
    scheduler = SimpleNamespace(
        timesteps=torch.tensor([900.0, 600.0, 300.0]), sigmas=[0.9, 0.5, 0.1, 0.0], config=None
    )
    clock = Clock(scheduler, linear_mix, lambda value: value)
    clock.start(900.0, None)
    clock.calls = step
    return ClosedLoop(Odd(), family, clock)


def test_an_exact_arrival_passes_and_the_smallest_change_does_not():
    loop().check(ONES, None, ONES.clone(), ONES)
    changed = ONES.clone()
    changed[0, 0, 1, 1] += EPS
    with pytest.raises(GuidanceMismatch, match="at step 0 is not the guided prediction: Odd"):
        loop().check(ONES, None, changed, ONES)


def test_the_family_says_what_arrives():
    loop(replace(SD, to_step=negated)).check(ONES, None, -ONES, ONES)
    with pytest.raises(GuidanceMismatch, match="at step 0"):
        loop(replace(SD, to_step=negated)).check(ONES, None, ONES, ONES)


@pytest.mark.parametrize("pending", [0, 1 << 20])
def test_later_steps_wait_until_they_are_verified(monkeypatch, pending):
    monkeypatch.setattr(closed_loop, "PENDING", pending)
    late = loop()
    for step in range(3):
        late.clock.calls = step
        late.check(ONES, None, ONES + (step == 1), ONES)
    with pytest.raises(GuidanceMismatch, match="at step 1"):
        late.verify()
    late.verify()  # the flags are read once


@pytest.mark.parametrize("algebraic", [None, ONES])
def test_a_prediction_that_is_not_finite_is_named_before_the_mismatch(algebraic):
    infinite = ONES.clone()
    infinite[0, 0, 0, 0] = float("inf")
    with pytest.raises(GuidanceMismatch, match=r"not finite at step 0\. Lower the scale"):
        loop().check(infinite, algebraic, ONES, ONES)


def test_the_algebraic_form_may_round():
    """Sizes 1 and 1, weight 2 - 1: 4 eps (1 + 2) 2 = 24 eps."""
    assert loop().k == 1.0
    loop().check(ONES, ONES, ONES + 24 * EPS, ONES)
    with pytest.raises(GuidanceMismatch):
        loop().check(ONES, ONES, ONES + 25 * EPS, ONES)


def test_a_mapped_prediction_may_round_as_much_as_the_map_amplifies():
    """At level 0.5: (2 + 1) 0.5 = 1.5 arrives; 4 eps (1 + 2) (1.5 + 2 / 0.5) = 66 eps."""
    affine = replace(SD, affine=True)

    def check(arrived):
        late = loop(affine, step=1)
        late.check(ONES, None, arrived, 2 * ONES)
        late.verify()

    check(1.5 * ONES + 66 * EPS)
    for arrived in (1.5 * ONES + 67 * EPS, ONES):
        with pytest.raises(GuidanceMismatch, match="at step 1"):
            check(arrived)


def test_no_prediction_and_another_shape_are_named_at_once():
    with pytest.raises(GuidanceMismatch, match="without a denoiser call"):
        loop().check(None, None, ONES, ONES)
    with pytest.raises(GuidanceMismatch, match=r"got \[2, 1, 2, 2\].*computed \[1, 1, 2, 2\]"):
        loop(step=1).check(ONES, None, ONES.repeat(2, 1, 1, 1), ONES)
