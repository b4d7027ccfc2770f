"""PLADIS in torch against hand values, maps built with the entmax package, the explicit joint map,
identities and finite differences."""

import entmax as package
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.kernels.pladis import choose, eager, naive, pladis, pladis_joint, tiles
from diffalign.kernels.pladis import triton as fused

FORMS = pytest.mark.parametrize("form", [naive.pladis, eager.pladis], ids=["naive", "eager"])
ALPHAS = pytest.mark.parametrize("alpha", [1.5, 2.0])
HAND = {1.5: (-0.0486, 0.2928, 0.7558), 2.0: (-0.0486, 0.1408, 0.9078)}


def operands(
    rng: torch.Generator,
    queries: int = 7,
    keys: int = 9,
    size: int = 8,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    return [
        torch.randn(2, 3, n, size, generator=rng, dtype=torch.float64).to(dtype) * 1.5
        for n in (queries, keys, keys)
    ]


def weights(z: Tensor, strength: float, alpha: float) -> Tensor:
    """The blended map by torch's softmax and the entmax package."""
    sparse = package.sparsemax(z, -1) if alpha == 2 else package.entmax15(z, -1)
    return (1 - strength) * torch.softmax(z, -1) + strength * sparse


@FORMS
@ALPHAS
def test_hand_values(form, alpha):
    k = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    k[0, 0, :, 0] = torch.tensor([-2.0, 0.0, 0.5])
    q = torch.tensor([1.0, 0, 0], dtype=torch.float64).view(1, 1, 1, 3)
    got = form(
        q, k, torch.eye(3, dtype=torch.float64).view(1, 1, 3, 3), strength=2, alpha=alpha, scale=1
    )
    torch.testing.assert_close(
        got.flatten(), torch.tensor(HAND[alpha], dtype=torch.float64), rtol=0, atol=1.5e-4
    )  # 2 (+) 1 rounded digits


@FORMS
@ALPHAS
@pytest.mark.parametrize("strength", [0.0, 1.0, 2.0])
def test_weights_equal_the_entmax_package(form, alpha, strength, rng):
    q, k, _ = operands(rng, keys=8)
    eye = torch.eye(8, dtype=torch.float64).expand(2, 3, 8, 8)
    true = weights(q @ k.mT / 8**0.5, strength, alpha)
    torch.testing.assert_close(
        form(q, k, eye, strength=strength, alpha=alpha), true, rtol=0, atol=1e-12
    )
    single = form(q.float(), k.float(), eye.float(), strength=strength, alpha=alpha)
    assert (single - true).abs().max() <= 1e-6
    torch.testing.assert_close(single.sum(-1), torch.ones(2, 3, 7), rtol=0, atol=1e-6)


@ALPHAS
@pytest.mark.parametrize("keys", [1, 77, 512])
def test_fast_form_equals_the_truth(alpha, keys, rng):
    q, k, v = operands(rng, queries=17, keys=keys)
    base = torch.randn(2, 3, 17, 8, generator=rng, dtype=torch.float64)
    mass = torch.rand(2, 3, 17, generator=rng, dtype=torch.float64)
    for mask in masks(rng, keys, 17):
        for anchor in ({}, {"base": base}, {"base": base, "mass": mass}):
            settings = {"strength": 2.0, "alpha": alpha, "mask": mask, "scale": 0.5, **anchor}
            got, true = eager.pladis(q, k, v, **settings), naive.pladis(q, k, v, **settings)
            torch.testing.assert_close(got, true, rtol=0, atol=1e-11)


def masks(rng: torch.Generator, keys: int, queries: int) -> list[Tensor | None]:
    """No mask; boolean per batch row, per query, for all; additive biases finite and infinite."""
    keep = torch.rand(2, 1, 1, keys, generator=rng) < 0.7
    full = torch.rand(2, 3, queries, keys, generator=rng) < 0.7
    bias = torch.randn(2, 1, queries, keys, generator=rng, dtype=torch.float64)
    return [
        None,
        keep,
        full,
        keep[0, 0, 0],
        torch.where(keep, 0.0, -10000.0),
        bias.masked_fill(~keep, -torch.inf),
    ]


@FORMS
def test_masked_keys_do_not_exist(form, rng):
    q, k, v = operands(rng, keys=12)
    keep = torch.tensor([True, False] * 6)
    short = form(q, k[:, :, keep], v[:, :, keep], strength=2.0)
    for mask in (keep, torch.where(keep, 0.0, -torch.inf), torch.where(keep, 0.0, -10000.0)):
        torch.testing.assert_close(
            form(q, k, v, strength=2.0, mask=mask), short, rtol=0, atol=1e-12
        )
    dead = torch.ones(2, 1, 1, 12, dtype=torch.bool)
    dead[1] = False
    out = form(q, k, v, strength=2.0, mask=dead)
    assert (out[1] == 0).all()
    torch.testing.assert_close(out[0], form(q, k, v, strength=2.0)[0], rtol=0, atol=1e-12)


@FORMS
def test_strength_zero_is_dense_attention(form, rng):
    q, k, v = operands(rng)
    for mask in masks(rng, 9, 7):
        wide = None if mask is None else mask.expand(2, 3, 7, 9)
        dense = F.scaled_dot_product_attention(
            q, k, v, wide if wide is None or wide.dtype == torch.bool else wide.double()
        )
        torch.testing.assert_close(form(q, k, v, strength=0, mask=mask), dense, rtol=0, atol=1e-12)
    base = torch.randn(q.shape, generator=rng, dtype=torch.float64)
    assert torch.equal(form(q, k, v, strength=0, base=base), base)


@FORMS
@ALPHAS
def test_invariances(form, alpha, rng):
    q, k, v = operands(rng)
    out = form(q, k, v, strength=2.0, alpha=alpha)
    order = torch.randperm(9, generator=rng)
    torch.testing.assert_close(
        form(q, k[:, :, order], v[:, :, order], strength=2.0, alpha=alpha), out, rtol=0, atol=1e-12
    )
    ones = torch.ones_like(v)
    torch.testing.assert_close(
        form(q, k, ones, strength=2.0, alpha=alpha), torch.ones_like(q), rtol=0, atol=1e-12
    )
    flat = form(q, torch.zeros_like(k), v, strength=2.0, alpha=alpha)
    torch.testing.assert_close(flat, v.mean(2, keepdim=True).expand_as(q), rtol=0, atol=1e-12)
    anchored = form(
        q, k, v, strength=2.0, alpha=alpha, base=F.scaled_dot_product_attention(q, k, v)
    )
    torch.testing.assert_close(anchored, out, rtol=0, atol=1e-12)


@pytest.mark.parametrize("limit", [1, 40, 200, 600, 5000])
def test_tiles_give_the_same_rows(limit, rng, monkeypatch):
    q, k, v = operands(rng, queries=65, keys=9)
    base = torch.randn(q.shape, generator=rng, dtype=torch.float64)
    mass = torch.rand(q.shape[:3], generator=rng, dtype=torch.float64)
    for mask in masks(rng, 9, 65):
        whole = eager.pladis(q, k, v, strength=2.0, mask=mask, base=base, mass=mass)
        with monkeypatch.context() as patch:
            patch.setattr(eager, "CPU_SCORES", limit)
            cut = eager.pladis(q, k, v, strength=2.0, mask=mask, base=base, mass=mass)
        torch.testing.assert_close(cut, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_the_result_only(dtype, rng):
    q, k, v = operands(rng, keys=77, dtype=dtype)
    true = naive.pladis(q.double(), k.double(), v.double(), strength=2.0)
    single = (naive.pladis(q.float(), k.float(), v.float(), strength=2.0) - true).abs().max()
    got = eager.pladis(q, k, v, strength=2.0)
    assert got.dtype == dtype
    assert (
        (got.double() - true).abs() <= torch.finfo(dtype).eps / 2 * true.abs() + 2 * single + 1e-6
    ).all()


@ALPHAS
def test_gradient(alpha, rng):
    q, k, v = (t[:1, :2].clone().requires_grad_() for t in operands(rng, queries=3, keys=5, size=3))
    assert torch.autograd.gradcheck(lambda *x: pladis(*x, strength=2.0, alpha=alpha), (q, k, v))
    base = torch.randn(1, 2, 3, 3, generator=rng, dtype=torch.float64, requires_grad=True)
    mass = torch.rand(1, 2, 3, generator=rng, dtype=torch.float64, requires_grad=True)
    keep = torch.tensor([True, True, False, True, True])
    assert torch.autograd.gradcheck(
        lambda q, k, v, b, m: pladis(q, k, v, strength=2.0, alpha=alpha, mask=keep, base=b, mass=m),
        (q, k, v, base, mass),
    )


def test_fused_form_gives_gradients_and_query_masks_by_the_torch_path(rng):
    q, k, v = operands(rng, dtype=torch.float32)
    mask = torch.rand(2, 1, 7, 9, generator=rng) < 0.7
    assert torch.equal(
        fused.pladis(q, k, v, strength=2.0, mask=mask), pladis(q, k, v, strength=2.0, mask=mask)
    )
    q.requires_grad_()
    got = fused.pladis(q, k, v, strength=2.0)  # no GPU here: a launch would raise
    assert torch.equal(got, pladis(q, k, v, strength=2.0))
    assert torch.autograd.grad(got.sum(), q)[0].abs().sum() > 0
    q = q.detach()
    for name, value in (
        ("base", torch.zeros_like(q)),
        ("mass", torch.ones(q.shape[:3])),
        ("mask", torch.zeros(1, 1, 1, 9)),
    ):
        given = (
            {"base": torch.zeros_like(q), name: value.requires_grad_()}
            if name != "mask"
            else {name: value.requires_grad_()}
        )
        got = fused.pladis(q, k, v, strength=2.0, **given)
        assert torch.autograd.grad(got.square().sum(), value)[0].abs().sum() > 0


@FORMS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_autocast_changes_nothing(form, dtype, rng):
    """The products are float32 on purpose; a pipeline under autocast must not take them back to 16
    bits."""
    q, k, v = operands(rng, keys=77, dtype=dtype)
    for anchor in ({}, {"base": v[:, :, :7].contiguous()}):
        plain = form(q, k, v, strength=2.0, **anchor)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(form(q, k, v, strength=2.0, **anchor), plain)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [-1e5, torch.finfo(torch.float32).min, 60.3])
def test_a_float32_mask_beside_16_bit_queries_is_not_rounded(form, dtype, bias, rng):
    q, k, v = operands(rng, dtype=dtype)
    mask = torch.full((1, 1, 1, 9), bias)
    if bias == 60.3:
        mask = mask + torch.randn(9, generator=rng)
    single = form(q.float(), k.float(), v.float(), strength=2.0, mask=mask)
    assert torch.equal(form(q, k, v, strength=2.0, mask=mask), single.to(dtype))


@pytest.mark.parametrize(
    "form", [naive.pladis, eager.pladis, fused.pladis], ids=["naive", "eager", "triton"]
)
def test_nothing_in_nothing_out(form, rng):
    q, k, v = operands(rng, dtype=torch.float32, size=40)
    assert form(q[:0], k[:0], v[:0], strength=2.0).shape == (0, 3, 7, 40)
    assert form(q[:, :, :0], k, v, strength=2.0).shape == (2, 3, 0, 40)


def test_tiles_of_a_large_map():
    """On a CPU at most ``CPU_SCORES`` scores or 16 queries at a time; a compiler gets the whole in
    one."""
    q = torch.empty(2, 4, 3000, 8)
    parts = list(eager._tiles(q, 100))
    rows = eager.CPU_SCORES // (4 * 100)
    assert parts[0] == (slice(0, 1), slice(0, rows))
    assert len(parts) == 2 * -(-3000 // rows)
    assert next(eager._tiles(q, 1 << 20)) == (slice(0, 1), slice(0, 16))
    few = torch.empty(1000, 4, 10, 8)
    assert next(eager._tiles(few, 100))[0] == slice(0, rows // 10)


JOINT = {"text": slice(0, 5), "image": slice(5, 14)}
SWAPPED = {"text": slice(9, 14), "image": slice(0, 9)}


@ALPHAS
@pytest.mark.parametrize("parts", [JOINT, SWAPPED], ids=["text first", "image first"])
def test_joint_equals_the_explicit_map(alpha, parts, rng):
    q, k, v = operands(rng, queries=14, keys=14)
    dense = torch.softmax(q @ k.mT / 8**0.5, -1)
    true = naive.joint_weights(q @ k.mT / 8**0.5, strength=2.0, alpha=alpha, **parts)
    torch.testing.assert_close(
        pladis_joint(q, k, v, strength=2.0, alpha=alpha, **parts), true @ v, rtol=0, atol=1e-12
    )
    text, image = parts["text"], parts["image"]
    torch.testing.assert_close(
        true[..., image, text].sum(-1), dense[..., image, text].sum(-1), rtol=0, atol=1e-14
    )
    assert torch.equal(true[..., text, :], dense[..., text, :])
    assert torch.equal(true[..., image, image], dense[..., image, image])
    z = (q @ k.mT / 8**0.5)[..., image, text]
    mass = dense[..., image, text].sum(-1, keepdim=True)
    torch.testing.assert_close(
        true[..., image, text], mass * weights(z, 2.0, alpha), rtol=0, atol=1e-13
    )


def test_joint_uses_the_given_attention_and_form(rng):
    q, k, v = operands(rng, queries=14, keys=14)
    seen = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(v.shape[-1])
        return F.scaled_dot_product_attention(q, k, v)

    got = pladis_joint(q, k, v, strength=2.0, attend=attend, call=naive.pladis, **JOINT)
    assert seen == [16]
    torch.testing.assert_close(
        got, pladis_joint(q, k, v, strength=2.0, **JOINT), rtol=0, atol=1e-12
    )
    assert torch.equal(
        pladis_joint(q, k, v, strength=0, attend=attend, **JOINT),
        F.scaled_dot_product_attention(q, k, v),
    )
    assert seen == [16, 8]


def test_joint_with_a_key_mask_drops_the_keys(rng):
    q, k, v = operands(rng, queries=14, keys=14)
    keep = torch.ones(14, dtype=torch.bool)
    keep[3:5] = False  # two padded text tokens
    got = pladis_joint(q, k, v, strength=2.0, mask=keep.view(1, 1, 1, 14), **JOINT)
    short = pladis_joint(
        q[:, :, keep],
        k[:, :, keep],
        v[:, :, keep],
        strength=2.0,
        text=slice(0, 3),
        image=slice(3, 12),
    )
    torch.testing.assert_close(got[:, :, keep], short, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="must be a key mask"):
        pladis_joint(q, k, v, strength=2.0, mask=torch.ones(14, 14, dtype=torch.bool), **JOINT)


def test_joint_gradient(rng):
    q, k, v = (t[:1, :1].clone().requires_grad_() for t in operands(rng, queries=5, keys=5, size=3))
    parts = {"text": slice(0, 3), "image": slice(3, 5)}
    assert torch.autograd.gradcheck(lambda *x: pladis_joint(*x, strength=2.0, **parts), (q, k, v))


def test_choice_on_a_cpu(rng):
    q, k, v = operands(rng)
    choice = choose(q, k)
    assert choice.reason == "torch: cpu tensors (float64, head size 8, 9 keys)"
    assert torch.equal(choice.call(q, k, v, strength=2.0), pladis(q, k, v, strength=2.0))


@pytest.mark.parametrize(
    "call", [naive.pladis, eager.pladis, fused.pladis], ids=["naive", "eager", "triton"]
)
def test_errors(call, rng):
    q, k, v = operands(rng, dtype=torch.float32)
    cases = [
        (ValueError, "q must be", (q[:, :1], k, v), {}),
        (ValueError, "no keys", (q, k[:, :, :0], v[:, :, :0]), {}),
        (TypeError, "share one floating dtype", (q, k.half(), v), {}),
        (ValueError, "strength must be a finite number", (q, k, v), {"strength": float("inf")}),
        (ValueError, "alpha must be 1.5", (q, k, v), {"alpha": 1.0}),
        (
            TypeError,
            "boolean .* or an additive float bias",
            (q, k, v),
            {"mask": torch.ones(9, dtype=torch.int64)},
        ),
        (ValueError, r"must broadcast to \[B, A, N, L\]", (q, k, v), {"mask": torch.ones(8)}),
        (ValueError, "base must look like q", (q, k, v), {"base": q[..., :4]}),
        (ValueError, "needs base", (q, k, v), {"mass": q[..., 0]}),
        (TypeError, "share one floating dtype and device", (q, k.to("meta"), v), {}),
    ]
    for error, message, tensors, change in cases:
        with pytest.raises(error, match=message):
            call(*tensors, **{"strength": 2.0, **change})


def test_plan_says_no_clearly(rng):
    q, k, v = operands(rng, keys=9, size=36, dtype=torch.float32)
    with pytest.raises(ValueError, match="no tile for head size 36 with 9 keys"):
        fused.pladis(q, k, v, strength=2.0)
    assert tiles.plan(64, 0) is None
    assert tiles.plan(40, 77) == (64, 128, 32, 4, 26)
    assert tiles.plan(128, 512) == (128, 512, 16, 8, 148)
