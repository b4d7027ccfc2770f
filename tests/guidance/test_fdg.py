"""FDG beside diffusers' guider over a pyramid written from its definition, and in closed form."""

import math

import numpy as np
import pytest
import torch
from diffusers.guiders import frequency_decoupled_guidance as theirs
from scipy.ndimage import convolve1d

import diffalign as da
from diffalign.core import COND, UNCOND, StepInfo, UnsupportedModel
from diffalign.guidance import CFG, FDG
from diffalign.guidance.fdg import details
from diffalign.testing import tiny_pipeline
from diffalign.testing.contracts import GuidanceContract

EPS32 = torch.finfo(torch.float32).eps


class TestFDG(GuidanceContract):
    def make(self):
        return FDG(3.0, high=6.0)

    def off(self):
        return FDG(3.0, high=3.0), CFG(3.0)

    def rows(self, steps, batch):
        return 2 * steps * batch


class TestFDGOnFlow(TestFDG):
    """At scale 1 the conditional model runs alone; the default of the details follows."""

    flow = True

    def make(self):
        return FDG(3.0)

    def off(self):
        return FDG(1.0), CFG(1.0)


def pair(*shape):
    rng = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=rng), torch.randn(shape, generator=rng)


def guided(technique, cond, uncond):
    return technique.combine({COND: cond, UNCOND: uncond}, StepInfo(0, 10, 1.0), None)[0]


def blur(x):
    for axis in (-2, -1):
        x = convolve1d(x, np.array([1, 4, 6, 4, 1]) / 16, axis, mode="mirror")
    return x


def larger(x):
    """Twice the size by linear interpolation between the centres of pixels, then blurred."""
    x = x.double().numpy()
    for axis in (-2, -1):
        size = x.shape[axis]
        where, nodes = (np.arange(2 * size) + 0.5) / 2 - 0.5, np.arange(size)
        x = np.apply_along_axis(lambda line, w, n: np.interp(w, n, line), axis, x, where, nodes)
    return torch.from_numpy(blur(x))


def pyramid(x, levels):
    """Burt and Adelson's Laplacian pyramid in float64; half the size is the mean of four pixels."""
    assert levels == 2
    x = x.double()
    low = torch.from_numpy(blur(x.numpy()))
    low = low.unflatten(-1, (-1, 2)).mean(-1).unflatten(-2, (-1, 2)).mean(-2)
    return [x - larger(low), low]


@pytest.mark.parametrize("scales", [(10.0, 5.0), (0.5, 3.0)])
@pytest.mark.parametrize("shape", [(2, 4, 8, 16), (1, 3, 4, 2)])
def test_agrees_with_the_guider_of_diffusers(scales, shape, monkeypatch):
    """Its pyramid needs kornia, which is not installed; the one above replaces it."""
    monkeypatch.setattr(theirs, "_CAN_USE_KORNIA", True)
    monkeypatch.setattr(theirs, "build_laplacian_pyramid_func", pyramid)
    monkeypatch.setattr(theirs, "upsample_and_blur_func", larger)
    cond, uncond = pair(*shape)
    high, low = scales
    expected = theirs.FrequencyDecoupledGuidance([high, low]).forward(cond, uncond).pred
    out = guided(FDG(low, high=high), cond, uncond)
    # 41 products per value and four roundings, on values of the largest scale
    assert (out - expected).abs().max() < 45 * EPS32 * max(scales) * cond.abs().max()


def test_closed_form_of_two_waves():
    """The finest wave is all detail, since half the size cannot hold it; a constant has none."""
    x = torch.arange(16)
    checks = (1.0 - 2.0 * ((x[:, None] + x) % 2)).expand(1, 2, 16, 16)
    torch.testing.assert_close(details(checks), checks.clone())
    assert details(torch.full((1, 2, 16, 16), 3.0)).abs().max() <= 8 * EPS32 * 3.0
    cond = 2.0 + 0.5 * checks
    out = guided(FDG(3.0, high=7.0), cond, torch.zeros_like(cond))
    torch.testing.assert_close(out, 3.0 * 2.0 + 7.0 * 0.5 * checks)


def test_default_of_the_details_follows_the_scale():
    cond, uncond = pair(1, 2, 6, 6)
    expected = guided(FDG(4.0, high=7.0), cond, uncond)
    assert torch.equal(guided(FDG(4.0), cond, uncond), expected)


def test_frames_and_odd_sizes_are_filtered_one_by_one():
    cond, uncond = pair(2, 3, 4, 5, 7)
    out = guided(FDG(2.0, high=5.0), cond, uncond)
    frame = guided(FDG(2.0, high=5.0), cond[:, :, 1], uncond[:, :, 1])
    assert torch.equal(out[:, :, 1], frame)
    line, zero = pair(1, 1, 1, 1)[0], torch.zeros(1, 1, 1, 1)
    assert torch.equal(guided(FDG(2.0, high=5.0), line, zero), 2.0 * line)


def test_scale_one_with_sharper_details_needs_both_branches():
    cond, uncond = pair(1, 2, 8, 8)
    technique = FDG(1.0, high=4.0)
    assert technique.needs_uncond
    assert technique.passes(StepInfo(0, 10, 1.0), None) == (COND, UNCOND)
    expected = cond + 3.0 * details(cond - uncond)
    torch.testing.assert_close(guided(technique, cond, uncond), expected)


def test_packed_tokens_are_refused():
    rows = da.supports(tiny_pipeline("FluxPipeline"))
    assert "FluxPipeline predicts packed tokens" in {row.name: row.reason for row in rows}["fdg"]
    with pytest.raises(UnsupportedModel, match=r"FDG .* predicts packed tokens"):
        guided(FDG(3.0), torch.zeros(1, 4, 4), torch.zeros(1, 4, 4))


@pytest.mark.parametrize("options", [{"high": math.inf}, {"high": "3"}])
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=r"FDG.*high"):
        FDG(**options)
