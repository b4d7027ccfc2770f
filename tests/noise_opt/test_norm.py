"""The norm of Gaussian noise against numbers worked by hand and against scipy's chi law."""

import math

import pytest
import torch
from scipy.stats import chi

from diffalign.noise_opt.norm import chi_gradient, chi_log_p, clipped, usual_rate


@pytest.mark.parametrize(
    ("d", "r", "weighted", "radial"),
    [
        (16384, 128.0, -712.988, 8e-5),
        (16384, 140.8, -711.400, 0.2444),
        (16384, 115.2, -711.292, -0.2701),
        (65536, 256.0, -3306.352, None),
    ],
)
def test_published_values(d, r, weighted, radial):
    noise = torch.full((1, d), r / math.sqrt(d), dtype=torch.float64)
    assert float(-0.01 * chi_log_p(noise)) == pytest.approx(weighted, abs=1e-3)
    if radial is not None:
        outward = (chi_gradient(noise).double() * noise).sum() / r
        assert float(-0.01 * outward) == pytest.approx(radial, abs=1e-4)


def test_the_log_density_is_that_of_the_chi_law():
    noise = torch.randn(5, 3, 7, 2, generator=torch.Generator().manual_seed(0))
    norms = noise.double().flatten(1).norm(dim=1).numpy()
    ours = chi_log_p(noise).numpy()
    theirs = chi(42).logpdf(norms)
    assert ours - ours[0] == pytest.approx(theirs - theirs[0], abs=1e-9)


def test_the_gradient_is_that_of_autograd():
    noise = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(chi_log_p(noise).sum(), noise)
    assert torch.allclose(chi_gradient(noise.detach()).double(), expected, atol=1e-5)


def test_each_image_is_clipped_by_its_own_norm():
    gradient = torch.stack([torch.full((4,), 50.0), torch.full((4,), 0.005)])
    short = clipped(gradient, 0.1)
    assert short.norm(dim=1).tolist() == pytest.approx([0.1, 0.01])
    assert torch.equal(clipped(gradient, None), gradient)


def test_the_rate_grows_with_the_norm_of_noise():
    assert usual_rate((4, 64, 64)) == 5.0
    assert usual_rate((4, 128, 128)) == 10.0
    assert usual_rate((4, 8, 8)) == 0.625
