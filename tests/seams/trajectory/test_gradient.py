"""Gradients through an unmodified pipeline: exact, with techniques active, and in little memory."""

import pytest
import torch
from diffusers import AutoencoderTiny
from torch.autograd.graph import saved_tensors_hooks

import diffalign as da
from diffalign.core import Budget, BudgetExceeded, Meter
from diffalign.seams.trajectory.kernels import Eta, FlowSDE

SD, SDXL, SD3, FLUX = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
    "FluxPipeline",
)
PIXART, SANA, QWEN, CHROMA, WAN = (
    "PixArtSigmaPipeline",
    "SanaPipeline",
    "QwenImagePipeline",
    "ChromaPipeline",
    "WanPipeline",
)
slow = pytest.mark.slow
NAMES = [SD, *(pytest.param(n, marks=slow) for n in (SDXL, SD3, FLUX, PIXART, QWEN, CHROMA, WAN))]


def weights_of(images):
    """A smooth loss over pixels away from the clamp, whose derivative jumps."""
    inside = (images > 0.05) & (images < 0.95)
    return torch.linspace(0.5, 1.5, images.numel()).reshape(images.shape) * inside


def central(loss, noise, direction, step):
    """Directional derivative by central differences of fourth order."""
    near, far = (
        loss(noise + k * step * direction) - loss(noise - k * step * direction) for k in (1, 2)
    )
    return (8 * near - far) / (12 * step)


@pytest.fixture
def float64(monkeypatch):
    """Models, pipelines and schedulers that round to float32 on the way no longer do."""
    to, narrow = torch.Tensor.to, torch.Tensor.float

    def wide(x, *args, **kwargs):
        result = to(x, *args, **kwargs)
        rounded = x.dtype == torch.float64 and result.dtype == torch.float32
        return to(x, result.device) if rounded else result

    monkeypatch.setattr(torch.Tensor, "to", wide)
    monkeypatch.setattr(
        torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else narrow(x)
    )


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", [*NAMES, pytest.param(SANA, marks=slow)])
def test_the_gradient_is_that_of_central_differences(sampler_for, name):
    sampler = sampler_for(name, da.CFG(3.0), dtype=torch.float64, steps=2)
    for part in sampler.pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.double()
    with sampler:
        noise = sampler.start([3]).latents.double()
        weights = weights_of(sampler.render(noise, grad=False))
        leaf = noise.clone().requires_grad_()
        images = sampler.render(leaf)
        (gradient,) = torch.autograd.grad((images * weights).sum(), leaf)
        direction = gradient / gradient.norm()

        def loss(x):
            return (sampler.render(x, grad=False) * weights).sum()

        slope = float((gradient * direction).sum())
        # steps so small that no kink of the model lies between
        assert float(central(loss, noise, direction, 1e-5)) == pytest.approx(slope, rel=1e-4)
    assert all(p.requires_grad for p in sampler.pipe.vae.parameters())
    assert all(p.grad is None for p in sampler.pipe.vae.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_recomputed_is_kept_bit_for_bit(sampler_for, name):
    """Techniques at every seam act in both, and the images are those of a plain run."""
    sampler = sampler_for(name, da.APG(3.0, cap=5.0, momentum=-0.5), da.PLADIS(), steps=2)
    gradients = {}
    with sampler:
        state = sampler.start([3, 4])
        expected = sampler.decode(sampler.run(state))
        for mode in ("plain", "checkpoint"):
            leaf = state.latents.clone().requires_grad_()
            images = sampler.render(leaf, mode=mode, seeds=[3, 4])
            # some processors have other kernels under gradients, and the other pipelines get their
            # guided prediction in algebraic form there
            near = 1e-6 if name in (SD, SDXL, SD3, PIXART) else 2e-5
            torch.testing.assert_close(images, expected, rtol=0, atol=near)
            images.square().sum().backward()
            gradients[mode] = leaf.grad
        assert sampler.meter.backward == 2 * sampler.price() * 2
    assert gradients["plain"].abs().max() > 0
    assert torch.equal(gradients["plain"], gradients["checkpoint"])


def saved_bytes(sampler, mode):
    """Bytes that a rendering keeps for its backward pass, each tensor once, weights apart."""
    kept = {}
    weights = {
        p.data_ptr() for part in (sampler.pipe.unet, sampler.pipe.vae) for p in part.parameters()
    }

    def pack(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr(), tensor.numel()] = tensor
        return tensor

    with sampler, saved_tensors_hooks(pack, lambda tensor: tensor):
        images = sampler.render(sampler.segments.noise.requires_grad_(), mode=mode)
    assert images.requires_grad
    return sum(t.numel() * t.element_size() for t in kept.values())


@slow
def test_memory_grows_at_least_five_times_slower(sampler_for):
    growth = {}
    for mode in ("plain", "checkpoint"):
        few, many = (saved_bytes(sampler_for(SD, steps=n), mode) for n in (2, 6))
        growth[mode] = many - few
    assert growth["plain"] > 5 * growth["checkpoint"] > 0


def test_skipped_evaluations_count_as_constants(sampler_for):
    """The oracle: DDIM's linear chain with the predictions of a plain run, written out."""
    options = {"set_alpha_to_one": True}
    sampler = sampler_for(
        SD, steps=3, guidance_scale=1.0, kernel=Eta(0.0), scheduler="DDIMScheduler", options=options
    )
    with sampler:
        leaf = sampler.segments.noise.clone().requires_grad_()
        images = sampler.render(leaf, mode="skip", exact=3)
        (exact,) = torch.autograd.grad(images.sum(), leaf)
        whole = sampler.render(leaf)
        (expected,) = torch.autograd.grad(whole.sum(), leaf)
        assert torch.equal(exact, expected)
        (skipped,) = torch.autograd.grad(sampler.render(leaf, mode="skip").sum(), leaf)
        # x' = a'/a x + constant at the first two steps, and the exact last step to x0
        state = sampler.run(sampler.start([0], leaf.detach()), 2)
        _, last = sampler.twist(state, lambda images: images.flatten(1).sum(1))
        signal = [1 / (1 + s * s) ** 0.5 for s in sampler.grid.sigmas]
    size = float(skipped.abs().max())
    torch.testing.assert_close(skipped, last * signal[2] / signal[0], rtol=0, atol=1e-5 * size)


def test_the_residual_gradient_is_that_of_the_last_evaluations(sampler_for):
    """The oracle: a twist at the latents before the last evaluation. It stays where the exact
    gradient is zero."""
    sampler = sampler_for(
        SD, steps=3, guidance_scale=1.0, kernel=Eta(0.0), scheduler="DDIMScheduler",
        options={"set_alpha_to_one": True},
    )  # fmt: skip
    with sampler:
        leaf = sampler.segments.noise.clone().requires_grad_()
        images = sampler.render(leaf, mode="residual")
        state = sampler.start([0], leaf.detach())
        assert torch.equal(images, sampler.decode(sampler.run(state)))
        (residual,) = torch.autograd.grad(images.sum(), leaf)
        _, expected = sampler.twist(sampler.run(state, 2), lambda x: x.flatten(1).sum(1))
        assert sampler.meter.backward == 2
        (whole,) = torch.autograd.grad(sampler.render(leaf, mode="residual", exact=3).sum(), leaf)
        (exact,) = torch.autograd.grad(sampler.render(leaf).sum(), leaf)
    torch.testing.assert_close(residual, expected, rtol=0, atol=1e-6)
    assert torch.equal(whole, exact)


@pytest.mark.parametrize("name", NAMES)
def test_one_step_is_exact_and_the_approximations_have_a_gradient(sampler_for, name):
    """At one evaluation all modes are one; the start noise is in units of normal noise."""
    sampler = sampler_for(name, da.CFG(3.0), steps=1)
    gradients = {}
    with sampler:
        noise = sampler.start([3]).latents
        for mode in ("one_step", "checkpoint", "skip", "residual"):
            if mode == "one_step" and sampler.count != 1:
                continue
            leaf = noise.clone().requires_grad_()
            (gradients[mode],) = torch.autograd.grad(sampler.render(leaf, mode=mode).sum(), leaf)
    first = gradients["checkpoint"]
    assert first.abs().max() > 0
    assert all(torch.equal(gradient, first) for gradient in gradients.values())
    d = noise.numel()
    assert abs(float(noise.norm()) - (d - 1) ** 0.5) < 4 / 2**0.5 + 0.5


@slow
def test_ten_steps_checkpointed_are_those_of_plain_autograd(sampler_for):
    sampler = sampler_for(SD, da.CFG(3.0), dtype=torch.float64, steps=10)
    gradients = []
    with sampler:
        for mode in ("plain", "checkpoint"):
            leaf = sampler.segments.noise.clone().requires_grad_()
            gradients.append(torch.autograd.grad(sampler.render(leaf, mode=mode).sum(), leaf)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-12)


def test_a_saturated_pixel_passes_its_gradient_on_where_asked(sampler_for):
    sampler = sampler_for(SD, steps=2)
    with sampler:
        leaf = sampler.segments.noise.clone().requires_grad_()
        hard, through = (sampler.render(leaf, clamp=c) for c in ("hard", "straight_through"))
        assert torch.equal(hard, through)
        saturated = ((hard == 0) | (hard == 1)).to(hard.dtype)
        assert saturated.any()
        (none,) = torch.autograd.grad((hard * saturated).sum(), leaf)
        (some,) = torch.autograd.grad((through * saturated).sum(), leaf)
    assert not none.any()
    assert some.any()
    assert "denormalize" not in vars(sampler.pipe.image_processor)


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        (SD, None),
        pytest.param(SDXL, Eta(1.0), marks=slow),
        pytest.param(SD3, FlowSDE(), marks=slow),
    ],
)
def test_a_twist_is_the_reward_of_x0_and_its_gradient(sampler_for, name, kernel):
    sampler = sampler_for(name, da.CFG(3.0), dtype=torch.float64, kernel=kernel)

    with sampler:
        state = sampler.run(sampler.start([1, 2]), 2)
        weights = weights_of(sampler.preview(sampler.run(state, 3)))
        before, rows = state.latents.clone(), sampler.meter.rows

        def reward(images):
            return (images * weights).flatten(1).sum(1)

        values, gradient = sampler.twist(state, reward)
        assert sampler.meter.rows - rows == sampler.meter.backward == 4
        assert torch.equal(state.latents, before)
        # the same x0 that a run sees at the same latents
        again = reward(sampler.preview(sampler.run(state, 3)))
        torch.testing.assert_close(values, again, rtol=1e-5, atol=1e-4)
        direction = gradient / gradient.norm()

        def loss(x):
            moved = sampler.twist(type(state)(x, 2, 4, state.rng, state.scheduler), reward)[0]
            return moved.sum()

        slope = float(central(loss, state.latents, direction, 1e-3))
        assert slope == pytest.approx(float(gradient.norm()), rel=1e-3)
        end = sampler.run(state)
        finished, _ = sampler.twist(end, reward)
        torch.testing.assert_close(finished, reward(sampler.decode(end)))


def test_gradients_of_rewards_that_have_none_are_refused(sampler_for):
    sampler = sampler_for(SD, steps=2)
    with sampler:
        state = sampler.start([1, 2])
        for reward, match in (
            (lambda images: images.detach().flatten(1).sum(1), "without one"),
            (lambda images: images.sum(), r"must return \[2\] rewards"),
            (lambda images: images.flatten(1).sum(1) / 0, "must be finite"),
        ):
            with pytest.raises(ValueError, match=match):
                sampler.twist(state, reward)


def test_what_render_refuses(sampler_for):
    sampler = sampler_for(SD, steps=2, meter=Meter(Budget(backward=1)))
    with sampler:
        noise = sampler.segments.noise
        with pytest.raises(ValueError, match="NaN"):
            sampler.render(noise * float("nan"))
        with pytest.raises(ValueError, match=r"one_step.*has 2"):
            sampler.render(noise, mode="one_step")
        with pytest.raises(ValueError, match=r"render\(mode=\.\.\.\) must be one of"):
            sampler.render(noise, mode="fast")
        with pytest.raises(ValueError, match="at least 1"):
            sampler.render(noise, exact=0)
        with pytest.raises(ValueError, match="noise must be"):
            sampler.render(noise[:, :1])
        images = sampler.render(noise.clone().requires_grad_())
        with pytest.raises(BudgetExceeded, match="backward"):
            images.sum().backward()
        sampler.pipe.safety_checker = object()
        with pytest.raises(da.UnsupportedModel, match="safety checker"):
            sampler.render(noise)


def test_a_tiny_decoder_makes_previews(sampler_for):
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    with torch.random.fork_rng(devices=[]):
        tiny = AutoencoderTiny(**blocks, **widths, upsampling_scaling_factor=2)
    sampler = sampler_for(SD, tiny=tiny)
    with sampler:
        state = sampler.run(sampler.start([1, 2]), 2)
        images = sampler.preview(state)
        own = sampler.segments.decode(state.x0, [torch.Generator()] * 2)
    assert sampler.pipe.vae is not tiny
    with torch.no_grad():
        expected = (tiny.decode(state.x0).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images, expected)
    assert images.shape[0] == own.shape[0] == 2
    assert not torch.equal(images, own)
