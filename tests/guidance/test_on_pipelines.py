"""The identity table of guidance on real pipelines of every kind of call: off is off to the bit, and cost is what was declared."""

import math

import pytest
import torch

import diffalign as da
from diffalign.testing import tiny_inputs, tiny_pipeline

# one of each kind: batched eps, learned variance, flow, float32 mixing, two calls, cond first, affine with two calls, lists
FAMILIES = (
    "StableDiffusionPipeline",
    "PixArtSigmaPipeline",
    "StableDiffusion3Pipeline",
    "SanaPipeline",
    "FluxPipeline",
    "WanPipeline",
    "DiTPipeline",
    "Cosmos2TextToImagePipeline",
    "Lumina2Pipeline",
    "ZImagePipeline",
)
FLOW = {"StableDiffusion3Pipeline", "SanaPipeline", "FluxPipeline", "Lumina2Pipeline", "ZImagePipeline"}
STEPS, BATCH = 4, 2
pytestmark = pytest.mark.filterwarnings("ignore:The call asks", "ignore:The negative prompt has no effect")


class Flat:
    sees = "next"

    def score(self, latents, sigma, rows):
        return torch.zeros(len(rows))


EQUAL_TO_CFG = {
    "scheduled": da.ScheduledCFG(3.0, shape="constant"),
    "interval": da.IntervalCFG(3.0, sigma=(0.0, math.inf)),
    "adaptive": da.AdaptiveGuidance(3.0, threshold=1.5),
    "dynamic, one candidate": da.DynamicCFG(5.0, candidates=(3.0,)),
    "dynamic, no preference": da.DynamicCFG(3.0, candidates=(1.0, 5.0, 9.0), evaluators=(Flat(),)),
    "rescaled": da.RescaledCFG(3.0, phi=0.0),
    "magnitude": da.MagnitudeAware(3.0, alpha=0.0),
    "beta": da.BetaCFG(3.0, a=1.0, b=1.0, gamma=0.0),
}
EQUAL_TO_CONDITIONAL = {
    "scheduled": da.ScheduledCFG(1.0, shape="lambda"),
    "adaptive": da.AdaptiveGuidance(1.0, threshold=0.9),
    "apg": da.APG(1.0),
    "tcfg": da.TCFG(1.0),
    "rescaled": da.RescaledCFG(1.0),
    "magnitude": da.MagnitudeAware(1.0),
    "zero star": da.CFGZeroStar(1.0, zero_steps=0),
}


@pytest.fixture(scope="module", params=FAMILIES)
def pipe(request):
    made = tiny_pipeline(request.param)
    made.set_progress_bar_config(disable=True)
    return made


def call(pipe, technique):
    name = next(n for n in FAMILIES if n == type(pipe).__name__)
    with da.apply(pipe, technique) as session:
        out = pipe(**tiny_inputs(name, batch=BATCH, steps=STEPS))[0]
    return torch.as_tensor(out), session.report()


def test_off_switches_are_exact(pipe):
    expected, plain = call(pipe, da.CFG(3.0))
    for name, technique in EQUAL_TO_CFG.items():
        out, report = call(pipe, technique)
        assert torch.equal(out, expected), name
        assert report.rows == plain.rows, name
    expected, plain = call(pipe, da.CFG(1.0))
    for name, technique in EQUAL_TO_CONDITIONAL.items():
        if name == "zero star" and type(pipe).__name__ not in FLOW:
            continue
        out, report = call(pipe, technique)
        assert torch.equal(out, expected), name
        assert report.rows == plain.rows, name


def test_active_techniques_act_and_cost_what_they_declare(pipe):
    _, plain = call(pipe, da.CFG(3.0))
    unguided, conditional = call(pipe, da.CFG(1.0))
    both, one = plain.rows // plain.steps, conditional.rows // conditional.steps
    for technique, saved in (
        (da.ScheduledCFG(3.0), 1),
        (da.IntervalCFG(3.0, stop=0.5), plain.steps - plain.steps // 2),
        (da.AdaptiveGuidance(3.0, threshold=-1.0), plain.steps - 2),
        (da.APG(3.0), 0),
        (da.TCFG(3.0), 0),
        (da.RescaledCFG(3.0), 0),
        (da.MagnitudeAware(3.0, alpha=0.5), 0),
        (da.BetaCFG(3.0), 2),
    ):
        out, report = call(pipe, technique)
        assert report.rows == plain.rows - saved * (both - one), technique
        assert out.isfinite().all()
        assert not torch.equal(out, unguided), technique


def test_zero_star_pays_one_row_for_a_still_step():
    pipe = tiny_pipeline("StableDiffusion3Pipeline")
    _, report = call(pipe, da.CFGZeroStar(3.0, zero_steps=2))
    assert report.rows == 2 * BATCH * (STEPS - 2) + 2


def test_effective_scale_is_measured_on_the_latent_alone():
    """The learned variance of PixArt is not guided by techniques in another space and must not dilute the figure."""
    _, report = call(tiny_pipeline("PixArtSigmaPipeline"), da.APG(3.0, eta=1.0, cap=math.inf, momentum=0.0))
    assert report.scale == pytest.approx([3.0] * STEPS, rel=1e-3)


def test_chosen_weights_and_latches_are_reported():
    pipe = tiny_pipeline("StableDiffusionPipeline")

    class Rising(Flat):
        def score(self, latents, sigma, rows):
            return torch.arange(2.0).repeat(BATCH)

    _, report = call(pipe, da.DynamicCFG(3.0, candidates=(1.0, 4.0), evaluators=(Rising(),)))
    assert report.extras == {"unet": {"chosen": [[4.0] * BATCH] * STEPS}}
    assert report.scale == pytest.approx([4.0] * STEPS, rel=1e-4)
    _, report = call(pipe, da.AdaptiveGuidance(3.0, threshold=-1.0))
    assert report.extras == {"unet": {"crossed": [1] * BATCH}}
