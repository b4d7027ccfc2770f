"""Particles and trees through the door, on real pipelines: formulas as denoisers, and tiny nets."""

import math

import pytest
import torch

import diffalign as da
from diffalign.search import SMC, BestOfN, DTSStar
from diffalign.testing import tiny_pipeline
from diffalign.testing.mixture_pipeline import StripeReward, chain_of, mixture_pipeline
from diffalign.testing.mixtures import Exact, Mixture

TWO = Mixture.of([[-2.0], [1.5]], [0.4, 0.3], [0.7, 0.3])


def reward(x):
    return 1.5 * torch.tanh(x[:, 0])


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def points(method, nfe, **options):
    """A search on a pipeline whose denoiser is a formula."""
    return da.align(
        mixture_pipeline(TWO),
        "a point",
        method=method,
        reward=StripeReward(reward),
        budget=da.Budget(nfe=nfe + 6),
        num_inference_steps=6,
        guidance_scale=1.0,
        batch=2048,
        **options,
    )


@pytest.mark.parametrize("options", [{"eta": 1.0}, {"kernel": da.Eta()}], ids=str)
def test_evidence_of_particles_on_a_real_pipeline(options):
    """DDIM's own noise and our kernel: 100 populations of 4, whose standard error is about 7%
    (measured on the toy); 5 of them."""
    result = points(SMC(particles=4, populations=100, every=2), 100 * 4 * 6, **options)
    exact = Exact(TWO, chain_of(mixture_pipeline(TWO), 6, 1.0), reward).log_evidence
    assert math.exp(result.log[-1]["log_evidence"] - exact) == pytest.approx(1.0, abs=0.35)
    assert result.ledger.nfe == 100 * 4 * 6 + 6


def test_evidence_of_guided_particles_on_a_real_pipeline():
    """DAS: gradients through denoiser, decoder and reward; a backward pass for each step."""
    method = SMC(preset="das", particles=4, populations=50, tilt=0.7)
    result = points(method, 50 * 4 * 12, kernel=da.Eta())
    exact = Exact(TWO, chain_of(mixture_pipeline(TWO), 6, 1.0), reward, tilt=0.7).log_evidence
    assert math.exp(result.log[-1]["log_evidence"] - exact) == pytest.approx(1.0, abs=0.35)
    assert result.ledger.backward == 50 * 4 * 6


def test_a_guided_pass_needs_a_kernel_that_says_its_noise():
    with pytest.raises(ValueError, match="preset tds"):
        points(SMC(preset="tds"), 400, eta=1.0)


def search(method, folder=None, show=None, **options):
    return da.align(
        tiny_pipeline("StableDiffusionPipeline", text=True),
        "a red apple",
        method=method,
        reward=brightness,
        budget=da.Budget(nfe=150),
        kernel=da.Eta(),
        folder=folder,
        show=show,
        num_inference_steps=5,
        guidance_scale=3.0,
        height=16,
        width=16,
        **options,
    )


def test_a_tree_of_real_images(tmp_path):
    """The result is repeated from its moves, and the tree is drawn."""
    result = search(DTSStar(preset="small"))
    assert result.ledger.nfe <= 150
    assert result.score == pytest.approx(max(n.value for n in result.tree.nodes), abs=1e-5)
    again = result.replay()
    assert again.tobytes() == result.image.tobytes()
    names = {path.name for path in result.save(tmp_path)}
    assert {"tree.png", "tree.svg"} <= names


def test_below_the_first_descent_it_is_best_of_n_on_a_real_pipeline():
    ours, others = search(DTSStar(preset="paper")), search(BestOfN())
    assert ours.scored == others.scored == 14
    assert ours.score == others.score
    assert torch.equal(ours.tensor, others.tensor)
    assert ours.lineage == others.lineage


def test_an_interrupted_tree_goes_on_where_it_was(tmp_path):
    """Score, image and tree of a run that was stopped after three rounds and started again."""
    whole = search(DTSStar(preset="small"))
    rounds = []

    def stop(status):
        rounds.append(status)
        if len(rounds) == 3:
            raise KeyboardInterrupt

    first = search(DTSStar(preset="small"), tmp_path / "run", stop)
    assert first.end == "interrupted"
    second = search(DTSStar(preset="small"), tmp_path / "run")
    assert second.score == whole.score
    assert torch.equal(second.tensor, whole.tensor)
    assert second.tree.nodes == whole.tree.nodes


def apart(images, prompts):
    """A reward with a slope in every pixel."""
    weights = torch.linspace(-1.0, 1.0, images[0].numel()).reshape(images[0].shape)
    return (images * weights).flatten(1).sum(1)


apart.differentiable = True


def led(preset, tilt, folder=None, show=None):
    return da.align(
        tiny_pipeline("StableDiffusionPipeline", text=True),
        "a red apple",
        method=SMC(preset=preset, particles=2, tilt=tilt),
        reward=apart,
        budget=da.Budget(nfe=30),
        kernel=da.Eta(),
        folder=folder,
        show=show,
        num_inference_steps=3,
        guidance_scale=3.0,
        height=16,
        width=16,
    )


@pytest.mark.parametrize("preset", ["tds", "das"])
def test_the_image_that_a_gradient_led_to_is_the_result(preset, tmp_path):
    """Found, made again by the final call, replayed, and found again after a kill."""
    result = led(preset, 1000.0)
    assert torch.allclose(result.tensor, result.top[0].image, atol=1e-4)
    assert torch.equal(result.repeat()[0], result.tensor)
    assert not torch.allclose(result.tensor, led(preset, 1e-3).tensor, atol=1e-2)
    assert result.seed is None

    def kill(status):
        if status.step == 2:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        led(preset, 1000.0, tmp_path, kill)
    resumed = led(preset, 1000.0, tmp_path)
    assert torch.equal(resumed.tensor, result.tensor)
    files = resumed.save(tmp_path / "saved")
    drifts = torch.load(tmp_path / "saved" / "drifts.pt", weights_only=True)
    assert tmp_path / "saved" / "drifts.pt" in files
    assert list(drifts) == resumed.to_dict()["drifts"]


REFUSED = [
    (SMC(preset="tds"), {"nfe": 17}, "SMC needs at least nfe=18, decodes="),
    (SMC(preset="tds"), {"nfe": 400, "backward": 5}, "backward=6"),
    (da.ReNO(), {"nfe": 400, "backward": 1}, "ReNO needs at least nfe=12, .*backward=6"),
]


@pytest.mark.parametrize(("method", "limits", "text"), REFUSED, ids=str)
def test_a_budget_below_the_smallest_result_is_refused(method, limits, text):
    with pytest.raises(ValueError, match=f"The budget is too small: .*{text}"):
        gradients(method, **limits)


def test_the_smallest_budget_gives_a_result():
    result = gradients(SMC(preset="tds"), nfe=18, backward=6, decodes=9, rewards=9)
    assert result.scored == 1
    assert (result.ledger.nfe, result.ledger.backward) == (18, 6)


def gradients(method, **limits):
    return da.align(
        mixture_pipeline(TWO),
        "a point",
        method=method,
        reward=StripeReward(reward),
        budget=da.Budget(**limits),
        kernel=da.Eta(),
        num_inference_steps=6,
        guidance_scale=1.0,
    )
