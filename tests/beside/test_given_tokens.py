"""Editing, image-to-video and conditioned pipelines drop predictions of given tokens: no norm,
cosine, projection or report counts what never reaches the latents."""

import pytest
import torch

import diffalign as da
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline

TECHNIQUES = (
    da.CFG(),
    da.APG(),
    da.CFGZeroStar(zero_steps=0),
    da.TCFG(),
    da.MagnitudeAware(),
    da.RescaledCFG(),
    da.AdaptiveGuidance(),
)
BEHIND, BEFORE = slice(16, None), slice(0, 16)
CONDITION = "LTXConditionPipeline"
DROPPED = {
    "FluxKontextPipeline": BEHIND,
    "FluxKontextInpaintPipeline": BEHIND,
    "QwenImageEditPipeline": slice(4, None),
    "LTXImageToVideoPipeline": BEFORE,
}
SLOW = ("QwenImageEditPipeline", "FluxKontextInpaintPipeline")


def tripled(dropped):
    """Another prediction on tokens that the pipeline drops; None: those with their own time."""

    def hook(module, args, kwargs, output):
        value = output[0].clone()
        if dropped is not None:
            value[:, dropped] *= 3.0
        else:
            times = kwargs["timestep"]
            value[times < times.amax() - 1e-3] *= 3.0
        return (value, *output[1:])

    return hook


def check(name, technique, dropped, **more):
    pipe = tiny_pipeline(name)
    images, reports = [], []
    for hook in (None, tripled(dropped)):
        handle = hook and pipe.transformer.register_forward_hook(hook, with_kwargs=True)
        with da.apply(pipe, technique) as session:
            images.append(final(pipe, {**tiny_inputs(name, steps=4), **more}))
        reports.append(session.report())
        if handle:
            handle.remove()
    assert torch.equal(images[0], images[1])
    for column in ("scale", "cosine", "orthogonal"):
        first, second = (getattr(report, column) for report in reports)
        assert first == pytest.approx(second)


@pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in DROPPED],
)
def test_what_the_pipeline_drops_counts_nowhere(name, technique):
    check(name, technique, DROPPED[name])


@pytest.mark.slow
def test_several_reference_pictures_count_nowhere():
    check("QwenImageEditPlusPipeline", da.APG(), slice(4, None))


@pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("strength", [1.0, 0.2])
def test_given_frames_count_from_the_step_on_that_releases_them(technique, strength):
    """At strength 1 never; at .2 once the noise has fallen to theirs."""
    check(CONDITION, technique, None, strength=strength)


def test_given_frames_are_released_at_some_step():
    pipe, counts = tiny_pipeline(CONDITION), []

    def count(module, args, kwargs):
        times = kwargs["timestep"]
        counts.append(int((times >= times.amax() - 1e-3)[0].sum()))

    pipe.transformer.register_forward_pre_hook(count, with_kwargs=True)
    for strength, sizes in ((1.0, 1), (0.2, 2)):
        counts.clear()
        final(pipe, {**tiny_inputs(CONDITION, steps=4), "strength": strength})
        assert len(set(counts)) == sizes


@pytest.mark.parametrize("strength", [1.0, 0.2])
def test_cfg_is_the_pipelines_own(strength):
    pipe = tiny_pipeline(CONDITION)
    for rescale in (0.0, 0.7):

        def call(rescale=rescale):
            more = {"strength": strength, "guidance_rescale": rescale}
            return final(pipe, {**tiny_inputs(CONDITION, steps=4), **more})

        plain = call()
        with da.apply(pipe, da.CFG()):
            assert torch.equal(call(), plain)
