"""ReNO on the embedded model: it climbs, and its noise alone makes the image."""

import pytest
import torch

import diffalign as da
from diffalign.testing import tiny_pipeline
from diffalign.testing.search import solve

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


@pytest.mark.slow
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


class Failing(Redness):
    """It works three times, then memory ends or a score is no number; later it works again."""

    def __init__(self, error):
        self.error, self.calls = error, 0

    def __call__(self, images, prompts):
        self.calls += 1
        if len(images) == 1 and self.calls == 4:
            if self.error is not None:
                raise self.error
            return super().__call__(images, prompts) * float("nan")
        return super().__call__(images, prompts)


@pytest.mark.parametrize(
    ("error", "end"),
    [(torch.OutOfMemoryError("no room"), "out of memory: no room"), (None, "reward: The reward")],
)
def test_memory_or_a_score_that_ends_leaves_the_best_image(pipe, error, end, monkeypatch):
    monkeypatch.setattr("diffalign.core.errors._WARNED", set())
    with pytest.warns(UserWarning, match="ended early with the best image so far"):
        result = da.align(
            pipe, PROMPT, method="random-search:noises=9,batch=1", reward=Failing(error), **CALL
        )
    assert result.end.startswith(end)
    # the grey image, then two of the run
    assert result.scored == 2


@pytest.mark.slow
def test_what_is_optimised_is_drafted_in_one_step_and_run_in_full(pipe):
    """The published recipe for FLUX.1-schnell: climb with one step, render with more."""
    method = da.DraftCommit("reno:iterations=3,gradient=one_step", steps=1, commits=1)
    result = da.align(pipe, PROMPT, method=method, reward=Redness(), **CALL)
    image = pipe(PROMPT, latents=result.noise[None], output_type="pt", **CALL).images[0]
    assert torch.equal(image, result.tensor)
    # three drafts of one step, one image in full and the final call, both branches
    assert result.ledger.nfe == 2 * (3 * 1 + 2 + 2)


def test_the_master_noise_is_float32_and_the_result_that_of_the_model():
    """A model in bfloat16: the found noise is in its type and makes the image, bit for bit."""
    pipe = tiny_pipeline("StableDiffusionPipeline", text=True, dtype=torch.bfloat16)
    call = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 16, "width": 16}
    method = da.ReNO(iterations=3, clip=None, force=True)
    result = da.align(pipe, PROMPT, method=method, reward=Redness(), **call)
    assert result.noise.dtype == torch.bfloat16
    image = pipe(PROMPT, latents=result.noise[None], output_type="pt", **call).images[0]
    assert torch.equal(image.float(), result.tensor)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_never_worse_than_the_start(pipe, seed):
    method = da.ReNO(iterations=4, rate=5.0)
    result = da.align(pipe, PROMPT, method=method, reward=Redness(), seed=seed, **CALL)
    best = [moment.score for moment in result.history]
    assert best == sorted(best)
    assert result.score >= result.first.score - 1e-6


@pytest.mark.slow
def test_it_beats_best_of_n_at_equal_evaluations(plane):
    """A smooth reward of 30 noises, paired; twenty times it is never below its start."""
    gains = []
    for seed in range(30):
        ours, theirs = plane(rising, seed=seed), plane(rising, seed=seed)
        _, infos = solve(ours, da.ReNO(iterations=20, clip=1.0))
        solve(theirs, da.RandomSearch(noises=20))
        assert ours.best.score >= infos[0].values["score"]
        assert ours.meter.rows == theirs.meter.rows
        gains.append(ours.best.score - theirs.best.score)
    gain = torch.tensor(gains)
    assert gain.mean() > 3 * gain.std() / len(gains) ** 0.5


def rising(points):
    """Higher where the first coordinate and all others are large."""
    return points[:, 0] + 0.5 * points[:, 1:].tanh().sum(1)
