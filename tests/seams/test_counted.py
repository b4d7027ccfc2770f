"""Rows of a pipeline without a session are counted, and nothing else changes."""

import pytest
import torch

from diffalign.core import Budget, BudgetExceeded, Meter
from diffalign.seams.counted import counted
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline

NAME = "StableDiffusionPipeline"


def test_each_row_is_charged_before_it_runs():
    pipe = tiny_pipeline(NAME)
    plain, cls = final(pipe, tiny_inputs(NAME, steps=3)), type(pipe.unet)
    meter = Meter()
    with counted(pipe, meter):
        assert torch.equal(final(pipe, tiny_inputs(NAME, steps=3)), plain)
    assert (meter.rows, meter.calls) == (6, 3)
    meter = Meter(Budget(nfe=5))
    with counted(pipe, meter), pytest.raises(BudgetExceeded, match="nfe: 6 would pass"):
        final(pipe, tiny_inputs(NAME, steps=3))
    assert meter.rows == 4
    assert type(pipe.unet) is cls
    assert torch.equal(final(pipe, tiny_inputs(NAME, steps=3)), plain)
    assert meter.rows == 4
