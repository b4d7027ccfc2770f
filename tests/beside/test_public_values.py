"""What users and their callbacks read and write on a pipeline, and the forms in which they give
values: the same as without a session."""

import numpy as np
import pytest
import torch

import diffalign as da
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline

SD, SDXL, SD3, LTX, WAN, QWEN, FLUX = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
    "LTXPipeline",
    "WanPipeline",
    "QwenImagePipeline",
    "FluxPipeline",
)


def outcome(pipe, inputs, *techniques):
    with da.apply(pipe, *techniques):
        return final(pipe, dict(inputs()))


def reading(*names):
    rows = []

    def callback(pipe, index, timestep, tensors):
        rows.append(tuple(getattr(pipe, name) for name in names))
        return tensors

    return callback, rows


@pytest.mark.parametrize(
    ("name", "values"),
    [
        (SD, ("guidance_rescale", "do_classifier_free_guidance", "num_timesteps")),
        (SDXL, ("guidance_rescale", "do_classifier_free_guidance", "num_timesteps")),
        (LTX, ("guidance_rescale", "do_classifier_free_guidance", "num_timesteps")),
        (SD3, ("do_classifier_free_guidance", "num_timesteps", "guidance_scale")),
        (WAN, ("do_classifier_free_guidance", "num_timesteps", "current_timestep")),
        (QWEN, ("num_timesteps", "current_timestep", "guidance_scale")),
    ],
)
def test_callbacks_read_what_they_read_without_a_session(name, values):
    pipe, tables = tiny_pipeline(name), []
    for techniques in ((), (da.CFG(),), (da.IntervalCFG(stop=0.5),)):
        callback, rows = reading(*values)
        inputs = {**tiny_inputs(name, steps=3), "callback_on_step_end": callback}
        if "guidance_rescale" in values:
            inputs["guidance_rescale"] = 0.7
        with da.apply(pipe, *techniques):
            final(pipe, inputs)
        after = tuple(getattr(pipe, value) for value in values if value != "current_timestep")
        tables.append((rows, after))
    assert len(tables[0][0]) == 3
    assert tables[0] == tables[1] == tables[2]


@pytest.mark.parametrize("name", [SD, SDXL, LTX])
def test_a_callback_that_changes_the_rescaling(name):
    pipe = tiny_pipeline(name)

    def change(pipe, index, timestep, tensors):
        pipe._guidance_rescale = 0.2 * index
        return tensors

    def inputs():
        more = {"guidance_rescale": 0.7, "callback_on_step_end": change}
        return {**tiny_inputs(name, steps=4), **more}

    plain = final(pipe, inputs())
    assert torch.equal(outcome(pipe, inputs, da.CFG()), plain)
    assert pipe.guidance_rescale == pytest.approx(0.6)


@pytest.mark.parametrize("name", [SD, SD3, WAN])
def test_where_the_technique_guides_and_the_call_does_not(name):
    """Both branches are in the batch, and callbacks that choose rows by the scale must know."""
    pipe = tiny_pipeline(name)
    callback, rows = reading("guidance_scale", "do_classifier_free_guidance")
    inputs = {**tiny_inputs(name, steps=2), "guidance_scale": 1.0, "callback_on_step_end": callback}
    with da.apply(pipe, da.CFG(4.0)):
        final(pipe, inputs)
    assert rows == [(4.0, True)] * 2
    assert pipe.guidance_scale == 1.0


def test_an_error_leaves_the_values_of_the_call():
    pipe = tiny_pipeline(SD)
    final(pipe, tiny_inputs(SD, steps=3))
    before = pipe.num_timesteps

    def fails(*_):
        raise KeyError("mine")

    inputs = {**tiny_inputs(SD, steps=2), "guidance_rescale": 0.5, "guidance_scale": 4.0}
    with da.apply(pipe, da.CFG()), pytest.raises(KeyError):
        final(pipe, {**inputs, "callback_on_step_end": fails})
    assert (pipe.guidance_rescale, pipe.guidance_scale, pipe.num_timesteps) == (0.5, 4.0, 2)
    pipe.unet.register_forward_pre_hook(fails)
    pipe._num_timesteps = before
    with da.apply(pipe, da.CFG()), pytest.raises(KeyError):
        pipe(**{**tiny_inputs(SD, steps=2), "prompt_embeds": torch.zeros(1, 7, 32)})


# -- one denoiser of two ---------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["transformer", "transformer_2"])
@pytest.mark.parametrize("scales", [(1.0, 4.0), (4.0, 1.0), (3.0, None)])
def test_one_expert_alone(missing, scales):
    pipe = tiny_pipeline(WAN, variant="2.2")
    setattr(pipe, missing, None)
    pipe.register_to_config(boundary_ratio=1.0 if missing == "transformer" else None)
    given = dict(zip(("guidance_scale", "guidance_scale_2"), scales))
    if missing == "transformer_2":
        del given["guidance_scale_2"]

    def inputs():
        values = tiny_inputs(WAN, variant="2.2", steps=4)
        values.pop("guidance_scale_2", None)
        return {**values, **given}

    plain = final(pipe, inputs())
    ours = outcome(pipe, inputs, da.CFG())
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5 if scales[0] > 1.0 else 0)
    with da.apply(pipe, da.CFG(3.0)) as session:  # whatever the call says
        final(pipe, inputs())
    assert session.report().nfe == 8


# -- forms of values -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [np.float32, np.float64, torch.tensor])
@pytest.mark.parametrize("name", [SD, SD3, WAN])
def test_a_scale_of_any_form(name, form):
    pipe = tiny_pipeline(name)
    for scale in (3.0, 1.0):

        def inputs(scale=scale):
            return {**tiny_inputs(name, steps=2), "guidance_scale": form(scale)}

        plain = final(pipe, inputs())
        with da.apply(pipe, da.CFG()) as session:
            ours = final(pipe, inputs())
        assert torch.equal(ours, plain)
        assert session.report().nfe == (4 if scale > 1.0 else 2)


@pytest.mark.parametrize("form", [list, np.array])
@pytest.mark.parametrize("name", [SD3, FLUX, QWEN])
def test_sigmas_of_any_form(name, form):
    pipe = tiny_pipeline(name)

    def inputs():
        return {**tiny_inputs(name), "sigmas": form([1.0, 0.7, 0.4])}

    plain = final(pipe, inputs())
    with da.apply(pipe, da.CFG()) as session:
        assert torch.equal(final(pipe, inputs()), plain)
    assert session.report().steps == 3


@pytest.mark.parametrize("form", [list, np.array, torch.tensor])
def test_refused_arguments_of_any_form(form):
    pipe = tiny_pipeline(SD3, variant="3.5")
    inputs = tiny_inputs(SD3, variant="3.5", steps=2)
    with da.apply(pipe, da.CFG()), pytest.raises(da.UnsupportedModel, match="skip_guidance_layers"):
        pipe(**inputs, skip_guidance_layers=form([0, 1]))
    with da.apply(pipe, da.CFG()):
        pipe(**tiny_inputs(SD3, variant="3.5", steps=2), skip_guidance_layers=None)
