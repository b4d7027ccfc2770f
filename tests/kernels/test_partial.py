"""Attention by parts of the keys against attention over all of them, written out in float64."""

import pytest
import torch

from diffalign.kernels.partial import attend_part, join

KINDS = [(torch.float64, 1e-14), (torch.float32, None), (torch.bfloat16, None)]


def draw(*shape, seed, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=rng, dtype=torch.float64)


def plain(q, k, v, scale=None):
    """Softmax attention and the log-sum-exp of its scores."""
    z = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return z.softmax(-1) @ v, z.logsumexp(-1)


@pytest.mark.parametrize(("dtype", "bound"), KINDS)
@pytest.mark.parametrize("lengths", [(1, 1), (7, 40), (130, 3)])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_parts_joined_are_the_whole(dtype, bound, lengths, scale):
    """Error at most twice that of torch's own attention over all keys in the same dtype, and two
    roundings of the largest value."""
    q = draw(2, 3, 33, 16, seed=0).to(dtype)
    k, v = (draw(2, 3, sum(lengths), 16, seed=s, scale=2.0).to(dtype) for s in (1, 2))
    parts = [
        attend_part(q, *pair, scale=scale) for pair in zip(k.split(lengths, 2), v.split(lengths, 2))
    ]
    expected, lse = plain(q.double(), k.double(), v.double(), scale)
    whole = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale).double()
    error = (join(*parts).double() - expected).abs().max()
    floor = 2 * torch.finfo(dtype).eps * v.double().abs().max()
    assert error <= 2 * (whole - expected).abs().max() + floor
    assert bound is None or error <= bound * v.abs().max()
    total = torch.logaddexp(parts[0].lse, parts[1].lse)
    # 133 keys are summed in the accumulator's precision; in 16 bits the kernel's exponentials are
    # rougher, far below a rounding of that dtype
    size = {torch.float64: 2e-16, torch.float32: 1.2e-7, torch.bfloat16: 2**-8 / 512}[dtype]
    assert (total.double() - lse).abs().max() <= 16 * size * lse.abs().max().clamp_min(1)
    assert join(*parts).dtype == dtype


def test_scores_far_apart():
    """A part that weighs nothing leaves the other as it is; nothing overflows."""
    q = torch.ones(1, 1, 2, 8)
    near, far = (torch.full((1, 1, 3, 8), s) for s in (200.0, -200.0))
    v, other = draw(1, 1, 3, 8, seed=3).float(), draw(1, 1, 3, 8, seed=4).float()
    first, second = attend_part(q, near, v), attend_part(q, far, other)
    assert torch.equal(join(first, second), first.output)
    assert torch.equal(join(second, first), first.output)


def test_hand_worked():
    """Scores 0 and log 3 on one key each: weights 1/4 and 3/4."""
    q = torch.ones(1, 1, 1, 1)
    keys = torch.tensor([0.0, 3.0]).log().nan_to_num(neginf=0.0)
    parts = [
        attend_part(q, key.reshape(1, 1, 1, 1), torch.full((1, 1, 1, 1), value), scale=1.0)
        for key, value in zip(keys, (4.0, 8.0))
    ]
    assert float(join(*parts)) == pytest.approx(7.0, abs=1e-6)


def test_where_there_is_no_log_sum_exp():
    q = draw(1, 2, 3, 8, seed=5).float()
    assert attend_part(q, q, q) is not None
    assert attend_part(q, q, q[..., :4]) is None
    assert attend_part(q, q.double(), q) is None
    assert attend_part(q, q[:, :, :0], q[:, :, :0]) is None
    with torch.enable_grad():
        wanted = q.clone().requires_grad_()
        assert attend_part(wanted, q, q) is None
        with torch.no_grad():
            assert attend_part(wanted, q, q) is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attend_part(q, q, q) is None
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert attend_part(q, q, q) is None


@pytest.mark.parametrize(
    ("dtype", "width", "has"),
    [
        (torch.float16, 64, True),
        (torch.bfloat16, 128, True),
        (torch.float32, 64, False),
        (torch.float16, 60, False),
        (torch.float16, 264, False),
    ],
)
def test_the_kernel_of_cuda_by_its_shapes(dtype, width, has):
    """torch's flash kernel for CUDA has been run by nobody here; its signature holds on shapes."""
    q = torch.empty(2, 3, 5, width, dtype=dtype, device="meta")
    k = torch.empty(2, 3, 7, width, dtype=dtype, device="meta")
    part = attend_part(q, k, k)
    assert (part is not None) is has
    if has:
        assert part.output.shape == q.shape
        assert part.lse.shape == q.shape[:-1]
        assert part.lse.dtype == torch.float32
        assert join(part, part).shape == q.shape
