"""ReNO on the embedded model: it climbs, and its noise alone makes the image."""

import pytest
import torch

import diffalign as da

PROMPT = "a photo of a red apple"
CALL = {"num_inference_steps": 2, "guidance_scale": 3.0}


class Redness:
    """How much more red than green an image is."""

    name, differentiable = "redness", True

    def __call__(self, images, prompts):
        return (images[:, 0] - images[:, 1]).mean((1, 2))


@pytest.fixture(scope="module")
def pipe():
    pipe = da.load("emoji")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_climbs_and_its_noise_makes_the_image(pipe):
    result = da.align(pipe, PROMPT, method=da.ReNO(iterations=6), reward=Redness(), **CALL)
    assert result.score > result.first.score
    assert next(entry["score"] for entry in result.log) == pytest.approx(result.first.score)
    image = pipe(PROMPT, latents=result.noise[None], output_type="pt", **CALL).images[0]
    assert torch.equal(image, result.tensor)
    assert not any(parameter.requires_grad is False for parameter in pipe.unet.parameters())


def test_what_it_costs(pipe):
    ledger = da.align(
        pipe, PROMPT, method="reno:iterations=3,gradient=plain", reward=Redness(), **CALL
    ).ledger
    # three images and the final call, of 2 steps with both branches; two backward passes
    assert (ledger.nfe, ledger.backward, ledger.rewards) == (16, 8, 4)


def test_the_regulariser_keeps_the_norm(pipe):
    mode = (16 * 8 * 8 - 1) ** 0.5
    far = {}
    for weight in (0.0, 1.0):
        method = da.ReNO(iterations=8, regulariser=weight, clip=None, rate=0.5, weight=1000.0)
        log = da.align(pipe, PROMPT, method=method, reward=Redness(), **CALL).log
        far[weight] = max(abs(entry["norm"] - mode) for entry in log if "norm" in entry)
    assert far[1.0] < far[0.0]


def test_the_same_run_twice(pipe):
    runs = [
        da.align(pipe, PROMPT, method=da.ReNO(iterations=3), reward=Redness(), seed=4, **CALL)
        for _ in range(2)
    ]
    assert torch.equal(runs[0].noise, runs[1].noise)
    assert torch.equal(runs[0].tensor, runs[1].tensor)


def test_a_gradient_that_is_not_finite_ends_with_the_best(pipe):
    class Broken(Redness):
        calls = 0

        def __call__(self, images, prompts):
            scores = super().__call__(images, prompts)
            if images.requires_grad:
                type(self).calls += 1
                if self.calls > 1:
                    scores = scores + 0 * (scores - scores.detach()).sqrt()
            return scores

    result = da.align(pipe, PROMPT, method=da.ReNO(iterations=9), reward=Broken(), **CALL)
    assert result.log[-1]["failures"] == 3
    assert result.scored == 4


def test_what_is_refused(pipe):
    class Flat(Redness):
        differentiable = False

    with pytest.raises(ValueError, match="needs a reward with gradient, and redness has none"):
        da.align(pipe, PROMPT, method=da.ReNO(), reward=Flat(), **CALL)
    with pytest.raises(ValueError, match="needs a trajectory of one evaluation; this one has 2"):
        da.align(pipe, PROMPT, method=da.ReNO(gradient="one_step"), reward=Redness(), **CALL)
