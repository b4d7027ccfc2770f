"""A threshold of AdaptiveGuidance that comes with a promise.

Learn then test (Angelopoulos, Bates, Candes, Jordan & Lei, "Learn then Test: Calibrating Predictive
Algorithms to Achieve Risk Control", 2021, arXiv:2110.01052): candidates are chosen on some images,
and tested on others in a fixed order, the most careful first, until one is not certain to keep the
bound. The last certain one then loses at most ``loss`` on average over the prompts and noises that
the images were drawn from, in all but a share ``1 - confidence`` of such calibrations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from diffalign.calibration.adaptive import Calibration, check_saving, conditions
from diffalign.calibration.curves import Curves, eight_bits, record
from diffalign.core import Tensor
from diffalign.core.reward import Reward
from diffalign.core.types import Pipeline
from diffalign.generate.samples import samples
from diffalign.generate.seeds import Job, jobs_of
from diffalign.generate.verdicts import Detector, verdicts
from diffalign.guidance.adaptive_guidance import AdaptiveGuidance
from diffalign.tasks.geneval.prompts import parse_prompt

SAVINGS = tuple(share / 100 for share in range(4, 49, 4))
"""Shares of plain CFG's evaluations that the candidates save on the images that choose them."""

CHOICE = 0.25
"""Share of the images that choose the candidates and are not tested on."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate and what the test said of it."""

    threshold: float
    # on the images of the test
    saving: float
    loss: float
    # of "its loss is above the bound"
    p: float


@dataclass(frozen=True, slots=True)
class Guarantee:
    """What is promised of the threshold of a calibration, and by which trials."""

    loss: float
    confidence: float
    # "pixels", or the name of a reward
    measure: str
    # of the test
    images: int
    # in the order of the test; the last one may have failed
    trials: tuple[Trial, ...]


def p_value(mean: float, count: int, bound: float) -> float:
    """How likely a mean loss this low is where the true one is ``bound``: the Hoeffding-Bentkus
    value (arXiv:2110.01052, proposition 1 of section 3), for losses in [0, 1].

    ``mean`` in [0, 1] over ``count`` images; ``bound`` in (0, 1).
    """
    low = min(mean, bound)
    divergence = (low * math.log(low / bound) if low else 0.0) + (1 - low) * math.log(
        (1 - low) / (1 - bound)
    )
    hoeffding = math.exp(-count * divergence)
    most = math.ceil(count * mean - 1e-9)
    bentkus = math.e * math.fsum(_binomial(k, count, bound) for k in range(most + 1))
    return min(1.0, hoeffding, bentkus)


def _binomial(k: int, n: int, p: float) -> float:
    """Probability of ``k`` successes in ``n`` trials."""
    ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(ways + k * math.log(p) + (n - k) * math.log1p(-p))


def least_images(loss: float, confidence: float) -> int:
    """The smallest number of images that can show the bound, if none of them loses anything."""
    return math.ceil(math.log(1 - confidence) / math.log(1 - loss))


def check_guarantee(images: int, loss: float, confidence: float) -> int:
    """The number of images that are tested on; ValueError where no test of them can succeed."""
    for name, value in (("loss", loss), ("confidence", confidence)):
        if not 0.0 < value < 1.0:
            raise ValueError(f"{name} must be above 0 and below 1; got {value:g}.")
    count = images - math.ceil(CHOICE * images)
    least = least_images(loss, confidence)
    if count < least:
        raise ValueError(
            f"A loss of at most {loss:g} at confidence {confidence:g} needs at least {least} "
            f"images to test on, {math.ceil(least / (1 - CHOICE))} in all; got {images}. Take more "
            "images, or allow a larger loss."
        )
    return count


@dataclass(slots=True)
class Correct:
    """As a reward, 1 for an image that GenEval's rules call correct, else 0."""

    judge: Detector
    name: str = "verdict"
    differentiable: bool = False

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Verdicts [B] on images [B, 3, H, W]; ValueError for a prompt that the rules cannot
        read."""
        records = [parse_prompt(prompt) for prompt in prompts]
        if None in records:
            raise ValueError(
                "measure=verdict reads prompts of GenEval's form, such as 'a photo of two dogs'; "
                f"got {prompts[records.index(None)]!r}. Measure pixels instead."
            )
        results = verdicts(self.judge, images, records)
        return torch.tensor([float(result is not None and result.correct) for result in results])


@dataclass(slots=True)
class _Images:
    """Images of AdaptiveGuidance, each made once: up to its latch a trajectory is plain CFG's, so
    that thresholds at which an image latches alike give the same image."""

    pipe: Pipeline
    rule: AdaptiveGuidance
    curves: Curves
    jobs: Sequence[Job]
    plain: Tensor
    batch: int
    call: dict[str, object]
    step: Callable[[], None] | None
    # (image, latch) -> uint8 [3, H, W]
    finished: dict[tuple[int, int], Tensor] = dataclasses.field(default_factory=dict)

    def at(self, threshold: float) -> Tensor:
        """uint8 [N, 3, H, W]."""
        latches = self.curves.latches(threshold).tolist()
        last = self.curves.cosine.shape[1]
        missing = [
            i for i, latch in enumerate(latches) if latch < last and (i, latch) not in self.finished
        ]
        techniques = (dataclasses.replace(self.rule, threshold=threshold),)
        results = samples(
            self.pipe,
            techniques,
            [self.jobs[i] for i in missing],
            batch=self.batch,
            call=self.call,
            step=self.step,
        )
        images = (eight_bits(sample.image) for group in results for sample in group)
        for i, image in zip(missing, images, strict=True):
            self.finished[i, latches[i]] = image
        return torch.stack(
            [
                self.plain[i] if latch == last else self.finished[i, latch]
                for i, latch in enumerate(latches)
            ]
        )

    @property
    def texts(self) -> list[str]:
        """The prompt of each image."""
        return [job.prompt for job in self.jobs]

    def trials(
        self, thresholds: Sequence[float], loss: float, confidence: float, measure: Reward | None
    ) -> list[Trial]:
        """The test of each threshold in this order, until one fails."""
        result: list[Trial] = []
        for threshold in thresholds:
            values = losses(self.plain, self.at(threshold), self.texts, measure)
            mean = float(values.mean())
            p = p_value(mean, len(self.jobs), loss)
            result.append(Trial(threshold, self.curves.saving(threshold), mean, p))
            if p > 1 - confidence:
                break
        return result


def certain(trials: Sequence[Trial], confidence: float) -> float:
    """The last threshold that passed; ValueError where none did."""
    if trials[0].p > 1 - confidence:
        raise ValueError(
            f"No threshold is certain at confidence {confidence:g} to keep the loss: the most "
            f"careful one, {trials[0].threshold:g}, lost {trials[0].loss:.4f} on average (p = "
            f"{trials[0].p:.2g}). Take more images, or allow a larger loss."
        )
    return [trial for trial in trials if trial.p <= 1 - confidence][-1].threshold


def losses(plain: Tensor, images: Tensor, prompts: Sequence[str], reward: Reward | None) -> Tensor:
    """What each image lost, float64 [N] in [0, 1]: the mean absolute difference of its pixels, or
    by how much its reward fell.

    ``plain`` and ``images``: uint8 [N, 3, H, W]. ValueError for a reward outside [0, 1].
    """
    if reward is None:
        return (images.double() - plain.double()).abs().mean((1, 2, 3)) / 255
    scores = []
    for pixels in (plain, images):
        parts = [
            reward(pixels[i : i + 16].float() / 255, prompts[i : i + 16])
            for i in range(0, len(prompts), 16)
        ]
        values = torch.cat(parts).double()
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError(
                "measure must be a reward with values in [0, 1]; got values from "
                f"{float(values.min()):g} to {float(values.max()):g}."
            )
        scores.append(values)
    return (scores[0] - scores[1]).clamp_min(0)


def certify_adaptive_guidance(
    pipe: Pipeline,
    prompts: Sequence[str],
    *,
    scale: float,
    steps: int,
    loss: float = 0.02,
    confidence: float = 0.95,
    measure: Reward | None = None,
    space: Literal["eps", "x0"] = "eps",
    negative_prompt: str = "",
    batch: int = 16,
    seed: int = 0,
    step: Callable[[], None] | None = None,
    **call: object,
) -> tuple[Calibration, Guarantee]:
    """The threshold with the largest saving among ``SAVINGS`` whose mean loss is at most ``loss``,
    certain to ``confidence``.

    ``measure``: a reward with values in [0, 1], whose fall is the loss; None for the mean absolute
    difference of pixels, in [0, 1]. The other arguments are those of
    ``calibrate_adaptive_guidance``.
    Cost: one generation with plain CFG, and for each candidate one of the images that latch at a
    step where none of the earlier candidates did. Raises ValueError for too few images, before
    anything runs, and where not even the first candidate is certain.
    """
    count = check_guarantee(len(prompts), loss, confidence)
    rule = AdaptiveGuidance(scale, space=space)
    check_saving(SAVINGS[0], steps, int(getattr(pipe.scheduler, "order", 1)), rule.min_guided_steps)
    call |= {"num_inference_steps": steps}
    call |= {"negative_prompt": negative_prompt} if negative_prompt else {}
    curves, plain = record(
        pipe,
        prompts,
        scale=scale,
        space=space,
        minimum=rule.min_guided_steps,
        batch=batch,
        seed=seed,
        step=step,
        **call,
    )
    first = len(prompts) - count
    chooses = dataclasses.replace(curves, cosine=curves.cosine[:first])
    tests = dataclasses.replace(curves, cosine=curves.cosine[first:])
    most = chooses.saving(-1.0)
    thresholds = sorted({chooses.threshold_for(s) for s in SAVINGS if s <= most}, reverse=True)
    jobs = jobs_of(prompts, base=seed)[first:]
    images = _Images(pipe, rule, tests, jobs, plain[first:], batch, call, step)
    trials = images.trials(thresholds, loss, confidence, measure)
    threshold = certain(trials, confidence)
    calibration = Calibration(
        threshold,
        tests,
        losses(images.plain, images.at(threshold), images.texts, None),
        float(tests.nfe(threshold).double().mean()),
        conditions(pipe, scale, steps, space, negative_prompt),
    )
    name = "pixels" if measure is None else str(getattr(measure, "name", type(measure).__name__))
    return calibration, Guarantee(loss, confidence, name, count, tuple(trials))
