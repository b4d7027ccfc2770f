"""The NAG epilogue against hand values, the paper's own order of operations in float64, identities
and finite differences."""

import pytest
import torch
from torch import Tensor

from diffalign.kernels.nag import choose, nag
from diffalign.kernels.nag import triton as fused

SETTING = {"scale": 5.0, "tau": 2.5, "alpha": 0.25}
NORMS = pytest.mark.parametrize("norm", ["l1", "l2"])


def paper(
    z_pos: Tensor, z_neg: Tensor, *, scale: float, tau: float, alpha: float, norm: str
) -> Tensor:
    """Row by row in float64, as the paper writes it: extrapolate, ratio of norms, clip, blend."""
    order = {"l1": 1, "l2": 2}[norm]
    out = torch.empty_like(z_pos, dtype=torch.float64)
    for b in range(z_pos.shape[0]):
        for n in range(z_pos.shape[1]):
            p, q = z_pos[b, n].double(), z_neg[b, n].double()
            guided = scale * p - (scale - 1) * q
            ratio = (guided.abs() ** order).sum() ** (1 / order) / (p.abs() ** order).sum() ** (
                1 / order
            )
            out[b, n] = alpha * guided * min(ratio.item(), tau) / ratio + (1 - alpha) * p
    return out


def pair(
    rng: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Half of the tokens far apart (clipped), half close (not clipped)."""
    pos, neg = (torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(2))
    neg[:, ::2] = pos[:, ::2] + 0.1 * neg[:, ::2]
    return pos.to(dtype), neg.to(dtype)


@pytest.mark.parametrize(
    ("neg", "norm", "expected"),
    [
        ((0.0, 1.0, 1.0), "l1", (1.375, 2.25, -1.875)),
        ((0.0, 1.0, 1.0), "l2", (1.3924, 2.2708, -1.9063)),
        ((0.9, 2.1, -1.0), "l1", (1.1, 1.9, -1.0)),
    ],
)
def test_hand_values(neg, norm, expected):
    pos = torch.tensor([[[1.0, 2.0, -1.0]]], dtype=torch.float64)
    got = nag(pos, torch.tensor([[neg]], dtype=torch.float64), norm=norm, **SETTING)
    torch.testing.assert_close(
        got, torch.tensor([[expected]], dtype=torch.float64), rtol=0, atol=5e-5
    )  # printed to four digits


@NORMS
def test_equals_the_paper(norm, rng):
    pos, neg = pair(rng, 2, 6, 40)
    torch.testing.assert_close(
        nag(pos, neg, norm=norm, **SETTING),
        paper(pos, neg, norm=norm, **SETTING),
        rtol=0,
        atol=1e-13,
    )


@NORMS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_rounds_once(norm, dtype, rng):
    pos, neg = pair(rng, 2, 6, 40, dtype=dtype)
    true = paper(pos, neg, norm=norm, **SETTING)
    operands = pos.double().abs() + 5 * (pos.double() - neg.double()).abs()
    bound = torch.finfo(dtype).eps / 2 * true.abs() + 8 * 2.0**-24 * operands
    assert ((nag(pos, neg, norm=norm, **SETTING).double() - true).abs() <= bound).all()


def test_half_precision_sums_do_not_overflow():
    pos = torch.full((1, 1, 3072), 100.0, dtype=torch.float16)  # |z|_1 = 307200 > 65504
    got = nag(pos, -pos, **SETTING)
    torch.testing.assert_close(got, pos * (0.25 * 2.5 + 0.75), rtol=2**-11, atol=0)


def test_off_is_the_same_tensor(rng):
    pos, neg = pair(rng, 1, 2, 8)
    assert nag(pos, neg, scale=1, tau=1, alpha=0.5) is pos
    assert nag(pos, neg, scale=5, tau=2.5, alpha=0) is pos
    assert fused.nag(pos, neg, scale=1, tau=1, alpha=0.5) is pos


@NORMS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_equal_texts_change_no_bit(norm, dtype, rng):
    pos = torch.randn(2, 5, 64, generator=rng, dtype=torch.float64).to(dtype)
    assert torch.equal(nag(pos, pos.clone(), norm=norm, **SETTING), pos)


def test_growth_bound_scaling_and_zero_rows(rng):
    pos, neg = pair(rng, 2, 6, 40)
    out = nag(pos, neg, **SETTING)
    limit = (0.25 * 2.5 + 0.75) * pos.abs().sum(-1)
    assert (out.abs().sum(-1) <= limit * (1 + 1e-12)).all()
    assert (out.abs().sum(-1)[:, 1::2] > 0.9 * pos.abs().sum(-1)[:, 1::2]).all()
    assert torch.equal(nag(4 * pos, 4 * neg, **SETTING), 4 * out)
    assert (nag(torch.zeros_like(pos), neg, **SETTING) == 0).all()
    assert (nag(torch.zeros_like(pos), torch.zeros_like(pos), **SETTING) == 0).all()


def test_rows_are_independent(rng):
    pos, neg = pair(rng, 3, 4, 16)
    out = nag(pos, neg, **SETTING)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(nag(pos[order], neg[order], **SETTING), out[order])
    assert torch.equal(nag(pos[1:2], neg[1:2], **SETTING), out[1:2])


@NORMS
def test_gradient_clipped_and_not(norm, rng):
    pos, neg = pair(rng, 1, 4, 6)
    pos.requires_grad_(), neg.requires_grad_()
    assert torch.autograd.gradcheck(lambda p, n: nag(p, n, norm=norm, **SETTING), (pos, neg))


def test_fused_form_gives_gradients_by_the_torch_path(rng):
    pos, neg = pair(rng, 1, 4, 8, dtype=torch.float32)
    pos.requires_grad_()
    got = fused.nag(pos, neg, **SETTING)  # no GPU here: a launch would raise
    assert torch.equal(got, nag(pos, neg, **SETTING))
    assert torch.autograd.grad(got.sum(), pos)[0].abs().sum() > 0
    away = neg.clone().requires_grad_()
    assert (
        torch.autograd.grad(fused.nag(pos.detach(), away, **SETTING).sum(), away)[0].abs().sum() > 0
    )
    assert fused.nag(pos.detach()[:, :0], neg[:, :0], **SETTING).shape == (1, 0, 8)
    with pytest.raises(Exception, match="driver"), torch.no_grad():
        fused.nag(pos, neg, **SETTING)


def test_plan_covers_every_width():
    for channels in range(8, fused.MAX_CHANNELS + 1, 8):
        block, warps = fused.plan(channels)
        assert channels <= block < max(257, 2 * channels)
        assert block // (32 * warps) in (8, 16)  # whole 16-byte loads of 16-bit elements per thread
        assert fused.refusal(torch.bfloat16, channels) is None
    assert "8200 channels" in str(fused.refusal(torch.float16, 8200))
    assert "36 channels" in str(fused.refusal(torch.float16, 36))
    assert "float64" in str(fused.refusal(torch.float64, 64))


def test_choice_on_a_cpu(rng):
    pos, neg = pair(rng, 1, 2, 16)
    choice = choose(pos)
    assert choice.reason == "torch: cpu tensors (float64 rows of 16 channels)"
    assert torch.equal(choice.call(pos, neg, **SETTING), nag(pos, neg, **SETTING))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tau": 0.9}, ValueError, "tau must be >= 1"),
        ({"alpha": 1.5}, ValueError, "alpha must lie in"),
        ({"scale": float("nan")}, ValueError, "scale must be a finite number"),
        ({"norm": "max"}, ValueError, "norm must be 'l1'"),
    ],
)
@pytest.mark.parametrize("call", [nag, fused.nag], ids=["torch", "triton"])
def test_errors(call, change, error, message):
    z = torch.zeros(1, 2, 8)
    with pytest.raises(error, match=message):
        call(z, z, **{**SETTING, **change})


def test_operand_errors():
    z = torch.zeros(1, 2, 8)
    with pytest.raises(ValueError, match=r"must both be \[B, N, E\]"):
        nag(z, z[:, :1], **SETTING)
    with pytest.raises(ValueError, match=r"must both be \[B, N, E\]"):
        nag(z[0], z[0], **SETTING)
    with pytest.raises(TypeError, match="share one floating dtype"):
        nag(z, z.half(), **SETTING)
    with pytest.raises(ValueError, match="12 channels"):
        fused.nag(torch.zeros(1, 2, 12), torch.ones(1, 2, 12), **SETTING)
