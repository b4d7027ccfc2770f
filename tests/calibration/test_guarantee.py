"""The promise of a threshold: its p-value against scipy and by hand, its rate on populations whose
losses are known, and its images against runs of their own."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.stats import binom

from diffalign.calibration import guarantee
from diffalign.calibration.curves import eight_bits
from diffalign.calibration.guarantee import (
    Correct,
    certify_adaptive_guidance,
    check_guarantee,
    least_images,
    losses,
    p_value,
)
from diffalign.core.seeds import seed_of
from diffalign.guidance.adaptive_guidance import AdaptiveGuidance
from diffalign.seams import apply
from diffalign.tasks.geneval.verdict import Detection, Thresholds
from diffalign.testing.tiny import tiny_pipeline


@pytest.mark.parametrize("count", [30, 150, 700])
@pytest.mark.parametrize("bound", [0.02, 0.3])
@pytest.mark.parametrize("mean", [0.0, 0.005, 0.019, 0.25, 0.9])
def test_p_value_is_the_smaller_of_two_bounds(mean, bound, count):
    low = min(mean, bound)
    entropy = sum(a * math.log(a / b) for a, b in ((low, bound), (1 - low, 1 - bound)) if a > 0)
    tail = math.e * binom.cdf(math.ceil(count * mean - 1e-9), count, bound)
    assert p_value(mean, count, bound) == pytest.approx(
        min(1.0, math.exp(-count * entropy), tail), rel=1e-9
    )


def test_numbers_worked_by_hand():
    # .98^149 = .0493, .98^148 = .0503: what no loss at all can show
    assert least_images(0.02, 0.95) == 149
    assert p_value(0.0, 149, 0.02) == pytest.approx(0.98**149)
    assert check_guarantee(199, 0.02, 0.95) == 149


@pytest.mark.parametrize("skew", [0.3, 8.0])
def test_a_bad_candidate_is_called_certain_as_rarely_as_promised(skew):
    """The true mean is the bound itself, the hardest case; beta and near Bernoulli losses."""
    rng = np.random.default_rng(0)
    bound, count, trials = 0.1, 200, 1500
    values = rng.beta(skew * bound, skew * (1 - bound), (trials, count))
    wrong = sum(p_value(float(mean), count, bound) <= 0.1 for mean in values.mean(1))
    assert wrong / trials <= 0.1


@pytest.mark.parametrize(
    ("images", "loss", "confidence", "words"),
    [
        (100, 0.02, 0.95, "needs at least 149 images to test on, 199 in all; got 100"),
        (500, 0.0, 0.95, "loss must be above 0"),
        (500, 0.02, 1.0, "confidence must be above 0 and below 1"),
    ],
)
def test_what_cannot_be_shown_is_refused_before_anything_runs(images, loss, confidence, words):
    with pytest.raises(ValueError, match=words):
        certify_adaptive_guidance(
            None, ["a"] * images, scale=3.0, steps=6, loss=loss, confidence=confidence
        )


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_pipeline("StableDiffusionPipeline", text=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PROMPTS = [f"a photo of {n}" for n in range(24)]
CALL = {"scale": 3.0, "steps": 6, "loss": 0.3, "confidence": 0.9, "batch": 8, "seed": 5}


@pytest.mark.slow
def test_its_images_are_those_of_the_threshold(pipe, monkeypatch):
    tested = []
    original = guarantee.losses

    def spy(plain, images, prompts, reward):
        tested.append(images.clone())
        return original(plain, images, prompts, reward)

    monkeypatch.setattr(guarantee, "losses", spy)
    calibration, promise = certify_adaptive_guidance(pipe, PROMPTS, **CALL)
    assert promise.images == 18
    assert promise.measure == "pixels"
    assert all(trial.p <= 0.1 for trial in promise.trials[:-1])
    thresholds = [trial.threshold for trial in promise.trials]
    assert thresholds == sorted(thresholds, reverse=True)
    assert calibration.threshold in thresholds
    texts = PROMPTS[6:]
    for trial, images in zip(promise.trials, tested, strict=False):
        rule = AdaptiveGuidance(3.0, threshold=trial.threshold)
        generators = [torch.Generator().manual_seed(seed_of(text, 0, base=5)) for text in texts]
        with apply(pipe, rule):
            alone = pipe(texts, num_inference_steps=6, generator=generators, output_type="pt")[0]
        difference = (eight_bits(alone).int() - images.int()).abs().max()
        assert int(difference) <= 1  # other batches, other last bits
    assert calibration.nfe == pytest.approx(
        float(calibration.curves.nfe(calibration.threshold).double().mean())
    )


def test_no_candidate_is_certain(pipe):
    class Loses:
        differentiable, name = False, "first"
        calls = 0

        def __call__(self, images, prompts):
            self.calls += 1
            return torch.full((len(images),), float(self.calls <= 2))

    with pytest.raises(ValueError, match=r"the most careful one, .* lost 1.0000 on average"):
        certify_adaptive_guidance(pipe, PROMPTS, measure=Loses(), **CALL)


def test_the_loss_is_the_fall_of_a_reward_or_the_change_of_pixels():
    plain = torch.zeros(3, 3, 2, 2, dtype=torch.uint8)
    images = plain.clone()
    images[1] = 51
    assert losses(plain, images, ["", "", ""], None).tolist() == pytest.approx([0, 0.2, 0])

    def reward(images, prompts):
        return 1 - images.mean((1, 2, 3))

    assert losses(plain, images, [""] * 3, reward).tolist() == pytest.approx([0, 0.2, 0], abs=1e-6)
    assert losses(images, plain, [""] * 3, reward).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"values in \[0, 1\]; got values from 1 to 1.4"):
        losses(plain, images, [""] * 3, lambda images, prompts: 1 + 2 * images.mean((1, 2, 3)))


def test_verdicts_as_a_reward():
    @dataclasses.dataclass
    class Judge:
        thresholds: Thresholds = dataclasses.field(default_factory=Thresholds)

        def detect(self, images):
            box = (0.0, 0.0, 30.0, 30.0)
            return [[Detection("dog", 0.95, box, "red")], []]

    right = Correct(Judge())
    assert right(torch.zeros(2, 3, 4, 4), ["a photo of a dog"] * 2).tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="reads prompts of GenEval's form"):
        right(torch.zeros(1, 3, 4, 4), ["a misty morning"])
