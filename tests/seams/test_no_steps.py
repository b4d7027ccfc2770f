"""A run without steps is what it is without a session."""

import pytest
import torch

import diffalign as da
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline


def inputs():
    return tiny_inputs("StableDiffusion3Pipeline") | {"num_inference_steps": 0}


@pytest.mark.parametrize("technique", [da.CFG(3.0), da.AdaptiveGuidance(3.0)])
def test_a_run_without_steps(technique):
    pipe = tiny_pipeline("StableDiffusion3Pipeline")
    plain = final(pipe, inputs())
    with da.apply(pipe, technique) as session:
        assert torch.equal(final(pipe, inputs()), plain)
    assert session.report().rows == 0
