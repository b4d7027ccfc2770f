"""A session counts what all its generations cost, and stops before its budget is passed."""

import pytest
import torch

import diffalign as da
from diffalign.core import Meter
from diffalign.testing import tiny_inputs, tiny_pipeline
from diffalign.testing.final import final

SD = "StableDiffusionPipeline"
STEPS = 4


def draw(pipe, **options):
    return final(pipe, tiny_inputs(SD, batch=2, steps=STEPS, **options))


def test_a_session_adds_up_its_generations():
    pipe = tiny_pipeline(SD)
    with da.apply(pipe, da.CFG(3.0)) as session:
        draw(pipe)
        assert session.meter.nfe == session.report().rows == 2 * 2 * STEPS
        draw(pipe)
    assert session.report().rows == 2 * 2 * STEPS
    assert session.meter.nfe == 2 * 2 * 2 * STEPS
    assert session.meter.calls == 2 * STEPS


def test_the_call_that_would_pass_the_budget_is_not_made():
    pipe = tiny_pipeline(SD)
    native = draw(pipe)
    rows = []
    pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(args[0] if args else kwargs["sample"])),
        with_kwargs=True,
    )
    with da.apply(pipe, da.CFG(3.0), budget=da.Budget(nfe=10)) as session:
        with pytest.raises(da.BudgetExceeded, match="nfe: 12 would pass the budget of 10"):
            draw(pipe)
        assert sum(rows) == session.meter.nfe == 8
    assert torch.equal(draw(pipe), native)


def test_every_session_around_is_charged_and_may_stop():
    pipe, meter = tiny_pipeline(SD), Meter()
    with da.apply(pipe, budget=da.Budget(nfe=16)) as outer:
        with da.apply(pipe, da.CFG(3.0), meter=meter):
            draw(pipe)
            assert outer.meter.nfe == meter.nfe == 16
            with pytest.raises(da.BudgetExceeded):
                draw(pipe)
        # nothing is counted for work that was refused
        assert outer.meter.nfe == meter.nfe == 16


def test_seconds_are_a_budget_too():
    pipe = tiny_pipeline(SD)
    short = da.apply(pipe, da.CFG(3.0), budget=da.Budget(seconds=1e-9))
    with short, pytest.raises(da.BudgetExceeded, match="seconds"):
        draw(pipe)


def test_a_budget_and_a_meter_exclude_each_other():
    with pytest.raises(ValueError, match="not both"):
        da.apply(tiny_pipeline(SD), budget=da.Budget(nfe=1), meter=Meter())
    with pytest.raises(ValueError, match="must be positive"):
        da.Budget(backward=0)
