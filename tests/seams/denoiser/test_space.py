"""x0 read from a prediction is the scheduler's own, for every scheduler class of diffusers."""

import inspect
from dataclasses import dataclass

import diffusers
import pytest
import torch

import diffalign as da
from diffalign.core import COND, Guidance
from diffalign.families import FAMILIES
from diffalign.seams.denoiser.space import Parametrisation, parametrisation_of
from diffalign.testing import tiny_inputs, tiny_pipeline

SDXL = "StableDiffusionXLPipeline"
SCHEDULERS = sorted(
    name
    for name in dir(diffusers)
    if name.endswith("Scheduler")
    and inspect.isclass(cls := getattr(diffusers, name))
    and "dummy" not in cls.__module__
    and hasattr(cls, "step")
)
# classes whose step says what it takes for the clean image
SAYING = (
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EDMEulerScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
)
# classes whose ``convert_model_output`` gives the clean image, with the options that make it so
CONVERTING = {
    "DPMSolverMultistepScheduler": {"algorithm_type": "dpmsolver++"},
    "DPMSolverSinglestepScheduler": {"algorithm_type": "dpmsolver++"},
    "SASolverScheduler": {"algorithm_type": "data_prediction"},
    "UniPCMultistepScheduler": {"predict_x0": True},
}


VALUES = []


@dataclass(frozen=True, slots=True)
class Look(Guidance[None]):
    """Collects x0 of the conditional prediction."""

    def passes(self, step, state):
        return (COND,)

    def combine(self, preds, step, state):
        VALUES.append(step.convert(preds[COND], "native", "x0"))
        return preds[COND], None


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SAYING)
@pytest.mark.few(3)
def test_x0_is_the_schedulers(name, prediction):
    cls = getattr(diffusers, name)
    options = {"prediction_type": prediction}
    if "clip_sample" in inspect.signature(cls.__init__).parameters:
        options["clip_sample"] = False
    pipe, outputs = tiny_pipeline(SDXL), []
    pipe.scheduler = cls(**options)
    real = pipe.scheduler.step

    def step(model_output, timestep, sample, **kwargs):
        result = real(model_output, timestep, sample, **{**kwargs, "return_dict": True})
        names = ("denoised", "pred_original_sample")  # LCM calls x0 denoised with its boundary
        outputs.append(next(getattr(result, key) for key in names[1:] if hasattr(result, key)))
        return (result.prev_sample,)

    pipe.scheduler.step = step
    VALUES.clear()
    with da.apply(pipe, Look()):
        pipe(**tiny_inputs(SDXL, steps=4))
    order, compared = pipe.scheduler.order, 0
    for index, (ours, theirs) in enumerate(zip(VALUES, outputs, strict=True)):
        if index % order == 0 and theirs is not None:
            scale, compared = float(theirs.abs().max()), compared + 1
            torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=2e-5 * scale)
    assert compared


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow_prediction"])
@pytest.mark.parametrize("name", CONVERTING)
@pytest.mark.few(4)
def test_x0_is_what_multistep_solvers_convert_to(name, prediction):
    options = {**CONVERTING[name], "prediction_type": prediction}
    if prediction == "flow_prediction":
        options["use_flow_sigmas"] = True
    pipe, outputs = tiny_pipeline(SDXL), []
    pipe.scheduler = getattr(diffusers, name)(**options)
    real = pipe.scheduler.convert_model_output

    def convert(*args, **kwargs):
        outputs.append(real(*args, **kwargs))
        return outputs[-1]

    pipe.scheduler.convert_model_output = convert
    VALUES.clear()
    with da.apply(pipe, Look()):
        pipe(**tiny_inputs(SDXL, steps=4))
    assert len(VALUES) == len(outputs) == 4
    for ours, theirs in zip(VALUES, outputs):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=2e-5 * scale)


def test_edm_multistep_is_preconditioned_too():
    """Its step does not return x0; its own ``precondition_outputs`` does."""
    for cls, prediction in (
        (diffusers.EDMDPMSolverMultistepScheduler, "epsilon"),
        (diffusers.EDMDPMSolverMultistepScheduler, "v_prediction"),
    ):
        scheduler = cls(prediction_type=prediction)
        scheduler.set_timesteps(4)
        ours = parametrisation_of(FAMILIES[SDXL], scheduler)
        for sigma in (40.0, 1.0, 0.05):
            sample, output = torch.randn(2, 4), torch.randn(2, 4)
            x = scheduler.precondition_inputs(sample, sigma)
            theirs = scheduler.precondition_outputs(sample, output, sigma)
            x0 = ours.convert(output, x, sigma, "native", "x0")
            torch.testing.assert_close(x0, theirs, rtol=1e-5, atol=1e-5)
            back = ours.convert(x0, x, sigma, "x0", "native")
            torch.testing.assert_close(back, output, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.few(6)
def test_every_scheduler_is_read_or_refused(name):
    """No scheduler of diffusers ends in an error that is not ours, and ``supports`` agrees."""
    pipe = tiny_pipeline(SDXL)
    try:
        pipe.scheduler = getattr(diffusers, name)()
        pipe.scheduler.set_timesteps(4)
    except (TypeError, ValueError, KeyError, ImportError, OSError):
        return  # it needs arguments or packages of its own
    support = {row.name: row for row in da.supports(pipe)}["cfg"]
    if support.works:
        assert isinstance(parametrisation_of(FAMILIES[SDXL], pipe.scheduler), Parametrisation)
        return
    with pytest.raises(da.UnsupportedModel, match=name) as error:
        parametrisation_of(FAMILIES[SDXL], pipe.scheduler)
    assert support.reason == str(error.value)
    with pytest.raises(da.UnsupportedModel, match=name), da.apply(pipe, da.CFG(3.0)):
        pipe(**tiny_inputs(SDXL, steps=4))
