"""Smoothed energy guidance: the blur against a slow one, and attention with blurred queries."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

import diffalign as da
from diffalign.core import UnsupportedModel
from diffalign.families import FAMILIES, families
from diffalign.guidance import CFG, SEG
from diffalign.guidance.seg import blur_matrix, blurred
from diffalign.testing.contracts import GuidanceContract
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline

SD = "StableDiffusionPipeline"
EPS = torch.finfo(torch.float32).eps
pytestmark = pytest.mark.filterwarnings(
    "ignore:The call asks", "ignore:The negative prompt has no effect"
)


class TestSEG(GuidanceContract):
    def make(self):
        return SEG(3.0, seg_scale=1.5, blur=4.0, layers=("mid_block.*",), start=0.0, stop=0.5)

    def off(self):
        return SEG(3.0, seg_scale=0.0), CFG(3.0)

    def rows(self, steps, batch):
        return batch * (2 * steps + steps // 2)


def call(pipe, *techniques, scale=4.0, steps=2, batch=2, **more):
    name = type(pipe).__name__
    dtype = more.pop("dtype", torch.float32)
    inputs = tiny_inputs(name, steps=steps, batch=batch, dtype=dtype)
    gate = dict.fromkeys(FAMILIES[name].gates[:1], scale)
    with da.apply(pipe, *techniques) as session:
        return final(pipe, {**inputs, **gate, **more}), session.report()


def slow_blur(planes, sigma):
    """The authors' filter, written out in float64 for any sides: ``planes`` [..., H, W]."""
    for axis in (-2, -1):
        size = planes.shape[axis]
        width = math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2
        width = min(width, size - (size % 2 - 1))
        x = torch.linspace(-(width - 1) / 2, (width - 1) / 2, width, dtype=torch.float64)
        kernel = torch.exp(-0.5 * (x / sigma) ** 2)
        kernel = (kernel / kernel.sum()).reshape(1, 1, -1)
        lines = planes.movedim(axis, -1)
        padded = F.pad(lines.reshape(-1, 1, size), (width // 2,) * 2, mode="reflect")
        planes = F.conv1d(padded, kernel).reshape(lines.shape).movedim(-1, axis)
    return planes


@pytest.mark.parametrize("sigma", [0.2, 0.8, 1.0, 2.5, 10.0, 1e5])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 7), (2, 9), (3, 2)])
def test_the_blur_is_the_slow_one(height, width, sigma):
    rng = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 3, 2 * height * width + 4, 5, generator=rng, dtype=torch.float64)
    out = blurred(queries, (2, height, width), sigma)
    image = queries[:, :, :-4].unflatten(2, (2, height, width))
    expected = slow_blur(image.movedim(-1, 2), sigma).movedim(2, -1).flatten(2, 4)
    assert (out[:, :, :-4] - expected).abs().max() <= 1e-12
    assert torch.equal(out[:, :, -4:], queries[:, :, -4:])  # what is behind the image


def test_the_ends_of_the_blur():
    queries = torch.randn(1, 2, 30, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(blurred(queries, (1, 5, 6), 1e-3), queries)
    mean = blurred(queries, (1, 5, 6), math.inf)
    assert (mean - queries.mean(2, keepdim=True)).abs().max() <= 8 * EPS
    frames = blurred(queries, (2, 3, 5), math.inf)  # each frame by itself
    assert (frames[:, :, :15] - queries[:, :, :15].mean(2, keepdim=True)).abs().max() <= 8 * EPS
    assert blur_matrix(1, 2.0).tolist() == [[1.0]]
    assert (blur_matrix(9, 3.0).sum(1) - 1).abs().max() <= 1e-12


def test_blurred_queries_are_blurred_scores():
    """The paper's equality, for keys of any kind."""
    rng = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 20, 8, generator=rng, dtype=torch.float64) for _ in range(2))
    scores = (q @ k.mT).reshape(1, 2, 4, 5, 20).movedim(-1, 2)
    expected = slow_blur(scores, 1.3).movedim(2, -1).reshape(1, 2, 20, 20)
    assert (blurred(q, (1, 4, 5), 1.3) @ k.mT - expected).abs().max() <= 1e-12


class Smoothed:
    """A processor of a U-Net's self-attention that blurs its queries, as a user's own."""

    def __init__(self, sigma, sides):
        self.sigma, self.sides = sigma, sides

    def __call__(self, attn, hidden_states, **rest):
        q, k, v = (
            layer(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        if math.isinf(self.sigma):
            q = q.mean(2, keepdim=True).expand_as(q)
        else:
            planes = q.mT.unflatten(-1, self.sides).double()
            q = slow_blur(planes, self.sigma).flatten(-2).mT.to(q)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


@pytest.mark.parametrize("sigma", [0.7, math.inf])
@pytest.mark.parametrize("scale", [4.0, 1.0], ids=["with CFG", "without"])
def test_seg_on_a_unet_is_blurred_queries(sigma, scale):
    pipe = tiny_pipeline(SD, dtype=torch.float64)
    size = {"height": 24, "width": 16, "dtype": torch.float64}
    twin = copy.deepcopy(pipe)
    sides, attention = [], twin.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    hook = twin.unet.mid_block.attentions[0].register_forward_pre_hook(
        lambda _, inputs: sides.append(tuple(inputs[0].shape[-2:]))
    )
    call(twin, CFG(1.0), steps=1, **size)
    hook.remove()
    attention.processor = Smoothed(sigma, sides[0])
    on, report = call(pipe, SEG(scale, seg_scale=2.0, blur=sigma), steps=1, **size)
    cfg, base = call(pipe, CFG(scale), steps=1, **size)
    cond, _ = call(pipe, CFG(1.0), steps=1, **size)
    worse, _ = call(twin, CFG(1.0), steps=1, **size)
    expected = cfg.double() + 2.0 * (cond.double() - worse.double())
    eps = torch.finfo(torch.float64).eps
    bound = 64 * 6.0 * eps * max(x.abs().max() for x in (cfg, cond, worse))
    assert (on - expected).abs().max() <= bound
    assert (expected - cfg).abs().max() > 20 * bound
    assert report.rows == base.rows + 2
    assert report.layers["BlurredQueries"] == (1, 1)


def test_no_blur_is_no_effect():
    pipe = tiny_pipeline(SD)
    plain, base = call(pipe, CFG())
    off, report = call(pipe, SEG(blur=0.0))
    assert torch.equal(off, plain)
    assert report.rows == base.rows
    faint, report = call(pipe, SEG(blur=1e-6))
    assert report.rows == base.rows * 3 // 2
    assert (faint - plain).abs().max() <= 64 * 7 * EPS * plain.abs().max()


PIPELINES = {family.name: family.pipelines[0] for family in reversed(families())}
WITHOUT = {"sana", "auraflow", "cogview4", "anyflow-far"}
SIZES = {  # images that are not square, where the tiny pipelines take a size
    "sd": {"height": 24, "width": 16},
    "sdxl": {"height": 24, "width": 16},
    "sd3": {"height": 16, "width": 8},
    "flux": {"height": 32, "width": 16},
    "chroma": {"height": 32, "width": 16},
    "qwen": {"height": 64, "width": 32},
    "pixart": {"height": 32, "width": 16},
    "wan": {"height": 32, "width": 16},
    "ltx": {"height": 64, "width": 32},
    "cogvideox": {"height": 48, "width": 32},
    "hunyuan-video": {"height": 48, "width": 32},
}
QUICK = {"sd", "flux"}


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in PIPELINES
        if name not in WITHOUT
    ],
)
def test_every_layer_of_every_family_has_a_grid(family, monkeypatch):
    """A wrong grid would not fit the tokens of a layer."""
    grids = []

    def note(queries, grid, blur):
        grids.append((grid, queries.shape[2]))
        return blurred(queries, grid, blur)

    monkeypatch.setattr("diffalign.guidance.seg.blurred", note)
    pipe = tiny_pipeline(PIPELINES[family])
    for size in ({}, SIZES.get(family, {})):
        grids.clear()
        on, report = call(pipe, SEG(blur=0.8, layers=("*",)), steps=2, batch=1, **size)
        assert on.isfinite().all()
        acted, selected = report.layers["BlurredQueries"]
        assert acted == selected > 0
        padded = family in ("hidream", "z-image")
        assert grids
        for (frames, height, width), tokens in grids:
            assert frames * height * width == tokens or (
                padded and frames * height * width < tokens
            )
        if size and not padded:
            finest = max(grids, key=lambda pair: pair[1])[0]
            assert finest[1] * size["width"] == finest[2] * size["height"]
    plain, _ = call(pipe, CFG(), steps=2, batch=1, **SIZES.get(family, {}))
    assert not torch.equal(on, plain)


def test_with_nag_and_pladis():
    for name in (SD, "FluxPipeline"):
        pipe = tiny_pipeline(name)
        others = da.NAG(3.0, tau=2.5, alpha=0.5, sigma=(0.0, math.inf)), da.PLADIS(1.5)
        on, report = call(pipe, SEG(4.0), *others)
        base, _ = call(pipe, CFG(4.0), *others)
        assert on.isfinite().all()
        assert not torch.equal(on, base)
        assert {"NAG", "PLADIS", "BlurredQueries"} <= set(report.layers)


def test_linear_attention_is_refused():
    with pytest.raises(UnsupportedModel, match=r"SEG cannot act on SanaPipeline: .* is linear"):
        call(tiny_pipeline("SanaPipeline"), SEG())
