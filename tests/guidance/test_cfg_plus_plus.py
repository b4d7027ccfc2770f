import math

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from diffalign.core import COND, UNCOND, Context, StepInfo, UnsupportedModel
from diffalign.guidance import CFG, CFGPlusPlus
from diffalign.testing.contracts import GuidanceContract, ddim
from diffalign.testing.oracles import noise_levels, run


class TestCFGPlusPlus(GuidanceContract):
    def make(self):
        return CFGPlusPlus(0.6)

    def off(self):
        return CFGPlusPlus(0.0), CFG(0.0)

    def rows(self, steps, batch):
        return 2 * steps * batch


class TestCFGPlusPlusOnFlow(TestCFGPlusPlus):
    flow = True


EULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("name", ["ddim", "ddim-v", "euler", "flow"])
def test_equals_the_sampler_of_the_paper(name, lam):
    """The paper's two lines, written out in float64: denoise with the guided noise, re-noise with
    the unconditional one."""
    contract = TestCFGPlusPlus()
    model, noise, steps = contract.model(), contract.noise(torch.float64), 12
    scheduler = {
        "ddim": lambda: ddim(),
        "ddim-v": lambda: ddim("v_prediction"),
        "euler": lambda: EulerDiscreteScheduler(**EULER),
        "flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    }[name]()
    trace = run(CFGPlusPlus(lam), model, scheduler, noise, steps=steps)
    scheduler.set_timesteps(steps)
    x, largest = noise * float(getattr(scheduler, "init_noise_sigma", 1.0)), 0.0
    for sigma, sigma_next in noise_levels(scheduler):
        largest = max(largest, x.abs().max().item())
        if name == "flow":  # x = (1 - sigma) x0 + sigma eps, velocity eps - x0
            cond, uncond = (model(x, sigma, "flow", p) for p in (COND, UNCOND))
            denoised, eps = x - sigma * (uncond + lam * (cond - uncond)), x + (1 - sigma) * uncond
            x = (1 - sigma_next) * denoised + sigma_next * eps
            continue
        root, root_next = math.hypot(1, sigma), math.hypot(1, sigma_next)
        y = x if name == "euler" else x * root  # y = x0 + sigma eps; the network sees y / root
        cond, uncond = (model(y / root, sigma, "eps", p) for p in (COND, UNCOND))
        y = y - sigma * (uncond + lam * (cond - uncond)) + sigma_next * uncond
        x = y if name == "euler" else y / root_next
    # the scheduler's tables are float32: relative 6e-8 per step, times the weight it multiplies
    weight = max(trace.technique.weight(s) for s in trace.steps)
    bound = 8 * steps * torch.finfo(torch.float32).eps * max(largest, 1.0) * max(weight, 1.0)
    assert (trace.sample - x).abs().max() < bound


def test_weight_by_hand():
    assert CFGPlusPlus(0.6, flow=False).weight(StepInfo(0, 4, 4.0, 1.0)) == pytest.approx(
        0.6 * 4 / 3
    )
    assert CFGPlusPlus(0.6, flow=True).weight(StepInfo(0, 4, 0.8, 0.5)) == pytest.approx(
        0.6 * 0.8 * 0.5 / 0.3
    )
    assert (
        CFGPlusPlus(0.6, flow=False).weight(StepInfo(3, 4, 1.0, 0.0)) == 0.6
    )  # the last step is CFG at lam


def test_lam_one_on_the_last_step_needs_no_unconditional_pass():
    trace = TestCFGPlusPlus().sample(CFGPlusPlus(1.0), model=TestCFGPlusPlus().model())
    final = trace.steps[-1].sigma_next
    assert trace.rows_per_call[-1] == (3 if final == 0.0 else 6)
    flow = TestCFGPlusPlusOnFlow().sample(CFGPlusPlus(1.0))
    assert flow.rows_per_call[-1] == 3


@pytest.mark.parametrize(
    "name",
    ["DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler"],
)
def test_other_schedulers_are_refused(name):
    with pytest.raises(UnsupportedModel, match=f"{name}.*DDIMScheduler"):
        CFGPlusPlus(0.6).resolve(Context("P", "sd", "unet", name, 5.0, "call", 20))


def test_flow_is_resolved_and_reported():
    name = "FlowMatchEulerDiscreteScheduler"
    context = Context("P", "sd3", "transformer", name, 5.0, "call", 20, flow=True)
    assert CFGPlusPlus().resolve(context).flow is True
    assert name in context.sources["flow"]


def test_rising_noise_levels_are_refused():
    with pytest.raises(ValueError, match="falling noise levels; step 2 goes from 1 to 1"):
        CFGPlusPlus(0.6, flow=False).weight(StepInfo(2, 4, 1.0, 1.0))


def test_lam_outside_the_unit_interval_is_refused():
    for lam in (-0.1, 1.5, np.nan):
        with pytest.raises(ValueError, match=r"CFGPlusPlus.*lam"):
            CFGPlusPlus(lam)
