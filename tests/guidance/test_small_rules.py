"""CFG-Zero*, rescale, TCFG, beta-CFG, magnitude-aware guidance: hand values, slow float64 forms,
identities."""

import math

import numpy as np
import pytest
import torch
from diffusers.guiders.magnitude_aware_guidance import mambo_guidance
from diffusers.guiders.tangential_classifier_free_guidance import normalized_guidance as tangential
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from scipy.stats import beta as beta_distribution

from diffalign.core import COND, UNCOND, Context, StepInfo, UnsupportedModel
from diffalign.guidance import CFG, TCFG, BetaCFG, CFGZeroStar, MagnitudeAware, RescaledCFG
from diffalign.testing.contracts import GuidanceContract

EPS32 = torch.finfo(torch.float32).eps
HAND = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 0.0]])


class TwoPasses(GuidanceContract):
    def rows(self, steps, batch):
        return 2 * steps * batch


class TestCFGZeroStar(GuidanceContract):
    flow = True

    def make(self):
        return CFGZeroStar(3.0, zero_steps=2)

    def off(self):
        return CFGZeroStar(1.0, zero_steps=0), CFG(1.0)

    def rows(self, steps, batch):
        return 2 * (steps - 2) * batch + 2  # one row at each still step, instead of none of use


class TestRescaledCFG(TwoPasses):
    def make(self):
        return RescaledCFG(3.0)

    def off(self):
        return RescaledCFG(3.0, phi=0.0), CFG(3.0)


class TestTCFG(TwoPasses):
    def make(self):
        return TCFG(3.0)

    def off(self):
        return TCFG(1.0), CFG(1.0)


class TestBetaCFG(GuidanceContract):
    def make(self):
        return BetaCFG(3.0)

    def off(self):
        return BetaCFG(3.0, a=1.0, b=1.0, gamma=0.0), CFG(3.0)

    def rows(self, steps, batch):
        return (2 * steps - 2) * batch  # the density is 0 at the first and the last step


class TestMagnitudeAware(TwoPasses):
    def make(self):
        return MagnitudeAware(3.0, alpha=0.5)

    def off(self):
        return MagnitudeAware(3.0, alpha=0.0), CFG(3.0)


def step(index=5, count=11, **options):
    return StepInfo(index, count, 0.5, convert=lambda value, *_: value, **options)


def combine(technique, cond, uncond, at=None):
    return technique.combine(
        {COND: cond, UNCOND: uncond}, step() if at is None else at, technique.init(len(cond))
    )[0]


def pair(seed=0, rows=3, like=0.0):
    rng = torch.Generator().manual_seed(seed)
    cond = torch.randn(rows, 4, 5, 6, generator=rng)
    return cond, like * cond + torch.randn(rows, 4, 5, 6, generator=rng)


def test_hand_values():
    assert combine(CFG(3.0), *HAND).tolist() == [[-1.0, 6.0]]
    assert combine(CFGZeroStar(3.0), *HAND).tolist() == [[1.0, 6.0]]  # s = 2 / 4
    # ratio 0.05: 1 + 9 exp(-0.4) = 7.0329, so 1 + 6.0329 * 0.05
    out = combine(MagnitudeAware(10.0), torch.tensor([[1.05, 0.0]]), torch.tensor([[1.0, 0.0]]))
    assert out[0, 0].item() == pytest.approx(1.0 + 7.0329 * 0.05, abs=5e-6)


def test_zero_star_in_float64():
    cond, uncond = pair(like=0.8)
    c, u = cond.double().flatten(1), uncond.double().flatten(1)
    s = (c @ u.T).diagonal()[:, None] / (u * u).sum(1, keepdim=True)
    expected = (s * u + 3.0 * (c - s * u)).reshape(cond.shape)
    # 120 products summed in float32, then four roundings
    assert (
        combine(CFGZeroStar(3.0), cond, uncond) - expected
    ).abs().max() < 130 * EPS32 * expected.abs().max()


def test_zero_star_with_equal_predictions_is_the_conditional_one():
    cond, _ = pair()
    assert (
        combine(CFGZeroStar(7.0), cond, cond) - cond
    ).abs().max() < 130 * EPS32 * 7 * cond.abs().max()


def test_still_steps_do_not_move_and_cost_one_row():
    contract = TestCFGZeroStar()
    trace = contract.sample(CFGZeroStar(3.0, zero_steps=2), stop=2)
    assert torch.equal(trace.sample, contract.noise())
    assert trace.rows_per_call == [1, 1]
    assert contract.sample(CFGZeroStar(3.0)).rows_per_call[:2] == [1, 6]


def test_zero_star_refuses_models_without_a_flow():
    with pytest.raises(UnsupportedModel, match="flow velocities; SomePipeline with DDIMScheduler"):
        CFGZeroStar(3.0).resolve(
            Context("SomePipeline", "sd", "unet", "DDIMScheduler", 5.0, "call", 20)
        )


@pytest.mark.parametrize("phi", [0.3, 0.7, 1.0])
def test_rescale_agrees_with_an_independent_implementation(phi):
    cond, uncond = pair()
    guided = uncond + 3.0 * (cond - uncond)
    expected = rescale_noise_cfg(guided.double(), cond.double(), guidance_rescale=phi)
    out = combine(RescaledCFG(3.0, phi=phi), cond, uncond)
    assert (out - expected).abs().max() < 130 * EPS32 * guided.abs().max()
    if phi == 1.0:
        assert torch.allclose(out.flatten(1).std(1), cond.flatten(1).std(1), rtol=1e-4)


@pytest.mark.parametrize("like", [0.0, 0.5, 3.0, -2.0])
def test_tcfg_agrees_with_a_singular_value_decomposition(like):
    cond, uncond = pair(like=like)
    matrix = torch.stack([cond.flatten(1), uncond.flatten(1)], 1).double()
    first = torch.linalg.svd(matrix, full_matrices=False).Vh[:, 0]
    kept = ((matrix[:, 1] * first).sum(1, keepdim=True) * first).reshape(cond.shape)
    expected = kept + 3.0 * (cond.double() - kept)
    out = combine(TCFG(3.0), cond, uncond)
    # the Gram matrix's relative error (120 eps) moves the direction by its inverse gap
    a, b, d = (matrix[:, i].mul(matrix[:, j]).sum(1) for i, j in ((0, 0), (0, 1), (1, 1)))
    gap = (torch.hypot(a - d, 2 * b) / (a + d)).min().item()
    assert (out - expected).abs().max() < 120 * EPS32 / gap * 4 * expected.abs().max()
    theirs = tangential(cond, uncond, 3.0)
    assert (out - theirs).abs().max() < 2 * 120 * EPS32 / gap * 4 * expected.abs().max()


def test_tcfg_special_cases():
    cond, _ = pair()
    assert torch.allclose(combine(TCFG(3.0), cond, cond), cond, atol=1e-5)  # nothing to remove
    assert torch.allclose(
        combine(TCFG(3.0), cond, 0.5 * cond), 0.5 * cond + 3.0 * 0.5 * cond, atol=1e-5
    )  # one direction: CFG
    flat = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert combine(TCFG(3.0), *flat).tolist() == [
        [3.0, 0.0]
    ]  # orthogonal and equal: the conditional direction
    assert combine(TCFG(3.0), torch.zeros(1, 2), torch.zeros(1, 2)).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (2.0, 2.0), (2.5, 4.0)])
def test_beta_density(a, b):
    for p in np.linspace(0, 1, 11):
        assert BetaCFG(1.0, a=a, b=b).density(float(p)) == pytest.approx(
            beta_distribution.pdf(p, a, b), rel=1e-12, abs=1e-300
        )


@pytest.mark.parametrize("gamma", [0.3, 1.0])
def test_beta_cfg_in_float64(gamma):
    cond, uncond = pair()
    moved = (cond - uncond).double().flatten(1)
    weight = 5.0 * 6 * 0.3 * 0.7  # Beta(2, 2) at 3/10
    expected = uncond + (weight * moved / moved.norm(dim=1, keepdim=True) ** gamma).reshape(
        cond.shape
    )
    out = combine(BetaCFG(5.0, gamma=gamma), cond, uncond, step(3))
    assert (out - expected).abs().max() < 130 * EPS32 * expected.abs().max()
    if gamma == 1.0:
        assert torch.allclose(
            (out - uncond).flatten(1).norm(dim=1), torch.full((3,), weight), rtol=1e-4
        )


def test_beta_cfg_measures_noise_predictions():
    """The norm is that of eps, whatever the model predicts: here eps is twice the native output."""
    cond, uncond = pair()
    native = combine(BetaCFG(5.0), cond, uncond)
    doubled = StepInfo(
        5,
        11,
        0.5,
        convert=lambda value, source, target, rows=None: (1.0 + (source != target)) * value,
    )
    out = combine(BetaCFG(5.0), cond, uncond, doubled)
    assert torch.allclose(out - uncond, (native - uncond) / 2, atol=1e-6)


def test_beta_cfg_of_a_single_step_is_plain():
    assert BetaCFG(5.0).weight(StepInfo(0, 1, 1.0)) == 5.0


@pytest.mark.parametrize("alpha", [0.5, 8.0])
def test_magnitude_aware_agrees_with_an_independent_implementation(alpha):
    cond, uncond = pair(like=0.9)
    flat = (
        value.double().flatten(1) for value in (cond, uncond)
    )  # the reference takes at most two axes besides the rows
    expected = mambo_guidance(*flat, 10.0, alpha=alpha).reshape(cond.shape)
    assert (
        combine(MagnitudeAware(10.0, alpha=alpha), cond, uncond) - expected
    ).abs().max() < 200 * EPS32 * expected.abs().max()


@pytest.mark.parametrize(
    "made",
    [CFGZeroStar(3.0), RescaledCFG(3.0), TCFG(3.0), MagnitudeAware(3.0)],
    ids=lambda m: type(m).__name__,
)
def test_a_learned_variance_is_not_measured(made):
    """Models that predict a variance too have twice the channels; what it holds must not change the
    latent's guidance."""
    cond, uncond = pair(like=0.8)
    plain = combine(made, cond, uncond)
    tail = torch.full_like(cond, 100.0)
    latent_only = StepInfo(
        5, 11, 0.5, convert=lambda value, source, target, rows=None: value[:, :4]
    )
    both = combine(made, torch.cat([cond, tail], 1), torch.cat([uncond, 2 * tail], 1), latent_only)
    assert torch.equal(both[:, :4], plain)


@pytest.mark.parametrize(
    ("cls", "options", "word"),
    [
        (CFGZeroStar, {"zero_steps": -1}, "zero_steps"),
        (RescaledCFG, {"phi": 1.5}, "phi"),
        (BetaCFG, {"a": 0.5}, "a="),
        (BetaCFG, {"gamma": 2.0}, "gamma"),
        (MagnitudeAware, {"alpha": -1.0}, "alpha"),
        (TCFG, {"scale": math.inf}, "scale"),
    ],
)
def test_bad_options_are_named(cls, options, word):
    with pytest.raises(ValueError, match=f"{cls.__name__}.*{word}"):
        cls(**options)
