"""Which step is this, in whole runs and in segments of them."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler

from diffalign.core import linear_mix
from diffalign.seams.denoiser.clock import Clock

TIMES, SIGMAS = (900.0, 600.0, 300.0, 100.0), (3.0, 2.0, 1.0, 0.5, 0.0)


def clock(times=TIMES, sigma_of=lambda value: value, **tables):
    tables = tables or {"sigmas": torch.tensor(SIGMAS)}
    scheduler = SimpleNamespace(timesteps=torch.tensor(times), config=None, **tables)
    return Clock(scheduler, linear_mix, sigma_of)


def run(clock, calls):
    steps = []
    for _ in range(calls):
        steps.append(clock.now(lambda value, *_: value))
        clock.calls += 1
    return steps


@pytest.mark.parametrize(("spacing", "steps"), [("leading", 5), ("trailing", 7), ("linspace", 6)])
def test_the_next_level_is_where_ddim_really_goes(spacing, steps):
    """Read off the scheduler itself: without noise, one step multiplies the sample by
    sqrt(abar_next / abar)."""
    scheduler = DDIMScheduler(
        timestep_spacing=spacing, clip_sample=False, steps_offset=1 if spacing == "leading" else 0
    )
    scheduler.set_timesteps(steps)
    clock = Clock(scheduler, linear_mix, lambda value: value)
    clock.start(float(scheduler.timesteps[0]), None)
    for t in scheduler.timesteps:
        step = clock.now(lambda value, *_: value)
        one = torch.ones(1, dtype=torch.float64)
        factor = float(scheduler.step(0 * one, t, one).prev_sample)
        here = 1 / (1 + step.sigma**2)
        assert 1 / (1 + step.sigma_next**2) == pytest.approx(here * factor**2, rel=1e-5)
        clock.calls += 1


def test_a_whole_run_reads_the_tables_in_order():
    whole = clock()
    whole.start(900.0, None)
    steps = run(whole, 4)
    assert [s.index for s in steps] == [0, 1, 2, 3]
    assert {s.count for s in steps} == {4}
    assert [s.timestep for s in steps] == list(TIMES)
    assert [s.sigma for s in steps] == [3.0, 2.0, 1.0, 0.5]
    assert [s.sigma_next for s in steps] == [2.0, 1.0, 0.5, 0.0]
    assert (whole.place, whole.sigma) == (3, 0.5)  # after the end: the last entry


def test_a_run_that_starts_later_finds_its_entry_by_the_nearest_time():
    later = clock()
    later.start(599.6, None)
    assert (later.offset, later.count) == (1, 3)
    step = run(later, 2)[-1]
    assert (step.index, step.sigma, step.timestep) == (1, 1.0, 300.0)


@pytest.mark.parametrize(
    ("first", "planned", "more", "offset", "count"),
    [
        (900.0, 2, {}, 0, 2),
        (900.0, 9, {}, 0, 4),  # no more steps than the tables have
        (600.0, 9, {}, 1, 3),
        # a segment after one evaluation, which begins at the second entry
        (600.0, 3, {"begin": 1}, 0, 4),
        (300.0, 1, {"begin": 2}, 0, 3),
        (300.0, 1, {"begin": 1}, 1, 2),
        (300.0, 1, {"begin": 2, "whole": 4}, 0, 4),
        (100.0, None, {"begin": 1, "whole": 2, "offset": 2}, 2, 2),
    ],
)
def test_a_segment_is_told_its_place(first, planned, more, offset, count):
    segment = clock()
    segment.start(first, planned, **more)
    assert (segment.offset, segment.count) == (offset, count)
    assert segment.calls == more.get("begin", 0)
    assert segment.timesteps[segment.place] == first


def test_two_evaluations_are_one_step():
    heun = clock(
        (900.0, 600.0, 600.0, 300.0, 300.0), sigmas=[3.0, 2.0, 2.0, 1.0, 1.0, 0.0], order=2
    )
    heun.start(900.0, None)
    steps = run(heun, 5)
    assert [(s.index, s.evaluation) for s in steps] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    assert {s.count for s in steps} == {3}
    assert [s.sigma for s in steps] == [3.0, 2.0, 2.0, 1.0, 1.0]
    heun.start(600.0, None)
    assert heun.offset == 1  # the first of equal times


def test_levels_of_a_table_are_converted_and_end_at_zero():
    short = clock(sigmas=SIGMAS[:4], sigma_of=lambda value: value / (1.0 + value))
    short.start(900.0, None)
    assert short.sigmas == pytest.approx([3 / 4, 2 / 3, 1 / 2, 1 / 3, 0.0])


def test_levels_from_signal_rates():
    """sqrt((1 - abar) / abar): 2 at 0.2, 1 at 0.5, 0.5 at 0.8."""
    rates = clock(
        (2.0, 1.0, 0.0), alphas_cumprod=torch.tensor([0.8, 0.5, 0.2]), final_alpha_cumprod=1.0
    )
    rates.start(2.0, None)
    assert rates.sigmas == pytest.approx([2.0, 1.0, 0.5, 0.0])
    assert rates.next_sigmas == pytest.approx([1.0, 0.5, 0.0])
