"""Sparse maps against hand values, the entmax package, score families and finite differences."""

import entmax as package
import pytest
import torch
from torch import Tensor

from diffalign.kernels.entmax import entmax, naive, newton

FORMS = pytest.mark.parametrize("form", [naive.entmax, newton.entmax], ids=["sort", "newton"])
ALPHAS = pytest.mark.parametrize("alpha", [1.5, 2.0])
HAND = {1.5: (0.0, 0.3260, 0.6740), 2.0: (0.0, 0.25, 0.75)}


def oracle(z: Tensor, alpha: float) -> Tensor:
    return package.sparsemax(z, -1) if alpha == 2 else package.entmax15(z, -1)


def families(keys: int, rng: torch.Generator) -> dict[str, Tensor]:
    """Score rows [8, keys] in float64 of 13 kinds, from flat to one sink."""
    noise = torch.randn(8, keys, generator=rng, dtype=torch.float64)
    ramp = torch.arange(keys, dtype=torch.float64).expand(8, -1)
    sink = noise.clone()
    sink[:, 0] += 8
    two = (torch.rand(8, keys, generator=rng, dtype=torch.float64) < 0.3).double() * 1.5
    heavy = noise / torch.rand(8, keys, generator=rng, dtype=torch.float64).clamp_min(1e-3)
    masked = noise.clone()
    masked[:, keys // 3 :] = -10000.0
    return {
        **{f"normal {std}": noise * std for std in (0.05, 0.2, 1.0, 2.0, 5.0, 10.0)},
        "constant": torch.zeros(8, keys, dtype=torch.float64),
        "sink": sink,
        "two levels": two + 0.01 * noise,
        "ramp": -ramp / keys * 4,
        "geometric": -torch.pow(torch.tensor(0.8, dtype=torch.float64), -ramp.clamp_max(90)),
        "heavy tail": heavy,
        "masked": masked,
    }


@FORMS
@ALPHAS
def test_hand_values(form, alpha):
    got = form(torch.tensor([-2.0, 0.0, 0.5], dtype=torch.float64), alpha)
    torch.testing.assert_close(
        got, torch.tensor(HAND[alpha], dtype=torch.float64), rtol=0, atol=5e-5
    )  # printed to four digits


def test_hand_threshold():
    x = torch.tensor([[-1.25, -0.25, 0.0]], dtype=torch.float64)  # (z - max) / 2 of the row above
    for solve in (naive.solve, newton.solve):
        assert solve(x, 1.5).item() == pytest.approx(-0.8209705, abs=5e-8)


@FORMS
@ALPHAS
def test_equals_the_entmax_package(form, alpha, rng):
    for keys in (1, 2, 77, 300):
        z = torch.randn(6, keys, generator=rng, dtype=torch.float64) * 3
        torch.testing.assert_close(form(z, alpha), oracle(z, alpha), rtol=0, atol=1e-13 * keys)
        assert (form(z.float(), alpha) - oracle(z, alpha)).abs().max() <= 1e-6


@ALPHAS
@pytest.mark.parametrize("keys", [77, 154, 256, 333, 512, 1024, 4608, 16384])
def test_newton_steps_suffice(alpha, keys, rng):
    for name, z in families(keys, rng).items():
        single = z.float()
        error = (
            (newton.entmax(single, alpha).double() - naive.entmax(single.double(), alpha))
            .abs()
            .sum(-1)
            .max()
            .item()
        )
        assert error < 1e-5, (name, error)
        exact = (newton.entmax(z, alpha) - naive.entmax(z, alpha)).abs().sum(-1).max().item()
        assert exact < 1e-11, (name, exact)


@FORMS
@ALPHAS
def test_rows_are_distributions_and_shift_free(form, alpha, rng):
    z = torch.randn(4, 5, 77, generator=rng) * 4
    p = form(z, alpha)
    assert (p >= 0).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(4, 5), rtol=0, atol=1e-6)
    order = torch.randperm(77, generator=rng)
    torch.testing.assert_close(form(z[..., order], alpha), p[..., order], rtol=0, atol=1e-6)
    torch.testing.assert_close(
        form(z.double() + 8.0, alpha), form(z.double(), alpha), rtol=0, atol=1e-13
    )


@FORMS
def test_sparsemax_support_lies_in_entmax_support(form, rng):
    z = torch.randn(50, 77, generator=rng, dtype=torch.float64) * 2
    wide, narrow = form(z, 1.5) > 0, form(z, 2.0) > 0
    assert (narrow & ~wide).sum() == 0
    assert narrow.sum() < wide.sum() < z.numel()


@FORMS
@pytest.mark.parametrize(("alpha", "gap"), [(1.5, 2.0), (2.0, 1.0)])
def test_one_dominating_score_takes_all(form, alpha, gap):
    z = torch.zeros(1, 40, dtype=torch.float64)
    z[0, 7] = gap
    assert form(z, alpha)[0].tolist() == [float(i == 7) for i in range(40)]
    z[0, 7] = gap - 0.01
    assert (form(z, alpha)[0] > 0).all()


@FORMS
@ALPHAS
def test_masked_keys_do_not_exist(form, alpha, rng):
    z = torch.randn(3, 30, generator=rng, dtype=torch.float64) * 2
    keep = torch.rand(30, generator=rng) < 0.5
    got = form(z, alpha, mask=keep)
    torch.testing.assert_close(got[:, keep], oracle(z[:, keep], alpha), rtol=0, atol=1e-12)
    assert (got[:, ~keep] == 0).all()
    torch.testing.assert_close(
        form(z.masked_fill(~keep, -torch.inf), alpha), got, rtol=0, atol=1e-15
    )
    assert (form(z, alpha, mask=torch.zeros(30, dtype=torch.bool)) == 0).all()


@FORMS
@ALPHAS
def test_extreme_scores_stay_finite(form, alpha):
    z = torch.tensor([[3e38, -3e38, 0.0], [-3e38, -3e38, -3e38], [1e4, 1e4 - 0.5, -1e4]])
    p = form(z, alpha)
    torch.testing.assert_close(p.sum(-1), torch.ones(3), rtol=0, atol=1e-6)
    assert p[0].tolist() == [1.0, 0.0, 0.0]
    assert form(torch.tensor([[torch.nan, 0.0]]), alpha).isnan().all()


@FORMS
@ALPHAS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once(form, alpha, dtype, rng):
    z = (torch.randn(20, 77, generator=rng) * 3).to(dtype)
    p = form(z, alpha)
    assert p.dtype == dtype
    true = naive.entmax(z.double(), alpha)
    half_ulp = torch.finfo(dtype).eps / 2
    assert (
        (p.double() - true).abs()
        <= half_ulp * true + torch.finfo(dtype).smallest_normal * half_ulp + 1e-6
    ).all()


@FORMS
@ALPHAS
def test_gradient(form, alpha, rng):
    z = torch.randn(4, 9, generator=rng, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: form(s, alpha), z)
    keep = torch.tensor([True, False, True, True, True, False, True, True, True])
    assert torch.autograd.gradcheck(lambda s: form(s, alpha, mask=keep), z)
    dead = torch.zeros(9, dtype=torch.bool)
    (grad,) = torch.autograd.grad(form(z, alpha, mask=dead).sum(), z)
    assert (grad == 0).all()
    weight = torch.randn(4, 9, generator=rng, dtype=torch.float64)
    (ours,) = torch.autograd.grad((form(z, alpha) * weight).sum(), z)
    (theirs,) = torch.autograd.grad((oracle(z, alpha) * weight).sum(), z)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_second_gradient_is_refused(rng):
    z = torch.randn(3, generator=rng, requires_grad=True)
    (grad,) = torch.autograd.grad(entmax(z).square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_errors():
    z = torch.zeros(3)
    with pytest.raises(ValueError, match=r"alpha must be 1\.5 or 2; got 1\.25"):
        entmax(z, 1.25)
    with pytest.raises(ValueError, match="at least one score"):
        entmax(torch.zeros(2, 0))
    with pytest.raises(TypeError, match="floating-point"):
        entmax(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="boolean"):
        entmax(z, mask=torch.zeros(3))


def test_steps_by_number_of_keys():
    assert [newton.iterations(keys) for keys in (1, 512, 513, 4608, 4609, 65536)] == [
        8,
        8,
        10,
        10,
        13,
        13,
    ]


@ALPHAS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradient_of_half_precision_scores_rounds_once(alpha, dtype, rng):
    """The sum in the closed form runs in float32: 2000 terms in half precision would be off by
    percents."""
    z = (torch.randn(3, 2000, generator=rng) * 0.05).to(dtype)
    grad = torch.randn(3, 2000, generator=rng).to(dtype) + 1
    found = []
    for kind in (dtype, torch.float64):
        leaf = z.to(kind, copy=True).requires_grad_()
        newton.entmax(leaf, alpha).backward(grad.to(kind))
        found.append(leaf.grad.double())
    error, size = (found[0] - found[1]).abs(), found[1].abs().max()
    assert (
        error.max() <= 2 * torch.finfo(dtype).eps * size
    )  # the weights are saved in the dtype, the result is rounded to it
