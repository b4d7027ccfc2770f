"""Pictures of adapters where a technique switches guidance on or off; callbacks that switch it on;
residuals that a step needs twice."""

import pytest
import torch

import diffalign as da
from diffalign.testing.beside import NEIGHBOURS
from diffalign.testing.beside.base import Part
from diffalign.testing.beside.check import setting
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline


def neighbour(name):
    return next(n for n in NEIGHBOURS if n.name == name)


@pytest.mark.parametrize("name", ["IP-Adapter with two pictures", "IP-Adapter of SD3"])
def test_pictures_without_guidance_are_the_positive_ones(name, tmp_path):
    case = neighbour(name)
    with setting(case, case.pipelines[0], tmp_path) as here:
        expected = here.run(Part(branch="cond"))
        with da.apply(here.pipe, da.CFG(1.0)):
            assert torch.equal(here.run(), expected)


def test_a_technique_that_guides_needs_negative_pictures(tmp_path):
    case = neighbour("IP-Adapter")
    with setting(case, case.pipelines[0], tmp_path) as here:
        with da.apply(here.pipe, da.CFG(3.0)), pytest.raises(ValueError, match="no negative pic"):
            here.run(Part(branch="cond"))
        assert torch.equal(here.run(Part(branch="cond")), here.run(Part(branch="cond")))


def test_a_callback_that_switches_guidance_on_is_refused():
    name = "ZImagePipeline"
    pipe = tiny_pipeline(name)

    def on(pipe, index, time, tensors):
        pipe._guidance_scale = 3.0
        return {}

    with da.apply(pipe, da.CFG()), pytest.raises(da.UnsupportedModel, match="it began without"):
        final(pipe, {**tiny_inputs(name, guided=False), "callback_on_step_end": on})


@pytest.mark.parametrize("name", ["CogVideoXPipeline", "StableDiffusionPipeline", "LTXPipeline"])
def test_a_rule_that_follows_the_call_cannot_begin_in_its_middle(name):
    """The call begins without guidance, and the technique has prepared both branches."""
    pipe = tiny_pipeline(name)

    def on(pipe, index, time, tensors):
        pipe._guidance_scale = 3.0
        return {}

    inputs = {**tiny_inputs(name), "guidance_scale": 1.0, "callback_on_step_end": on}
    with da.apply(pipe, da.ScheduledCFG()), pytest.raises(da.UnsupportedModel, match="began with"):
        pipe(**inputs)
