"""A guidance policy: which steps are guided, and how strongly, for a given number of evaluations.

Castillo et al., "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models",
2023, arXiv:2312.12487, section 4, search such policies by gradients through a relaxed choice at
every step. Here the choices are tried: guidance is taken from the steps whose images change least
without it, a few at a time, and then the weights of the steps that keep it are moved as long as
that brings the images nearer to plain guidance.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field

import torch

from diffalign.core import Tensor
from diffalign.core.types import Pipeline
from diffalign.generate.samples import samples
from diffalign.generate.seeds import Job, jobs_of
from diffalign.guidance.scheduled_cfg import ScheduledCFG

Shares = tuple[float, ...]

FACTORS = (0.75, 1.25, 1.5)
"""By what the weights of the guided steps are multiplied in trial."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Shares of the guidance weight, step by step, and how far its images are from plain guidance's
    on prompts that the search has not seen."""

    scale: float
    shares: Shares
    # per image; plain guidance takes 2 for each step
    nfe: int
    # mean squared difference of the final latents to plain guidance's, beside that of no guidance
    error: float
    unguided: float
    # the same on the prompts of the search
    error_seen: float
    trials: int

    @property
    def technique(self) -> ScheduledCFG:
        """The policy as a technique."""
        return ScheduledCFG(self.scale, shape="steps", shares=self.shares)


def check_policy(nfe: int, steps: int, order: int = 1) -> None:
    """Raise ValueError unless a policy of so many evaluations leaves something to search."""
    if order != 1:
        raise ValueError(
            "A policy needs a solver with one evaluation a step; take ddim, euler or dpm++."
        )
    if not steps < nfe < 2 * steps:
        raise ValueError(
            f"nfe must be above {steps}, no guidance at all, and below {2 * steps}, plain "
            f"guidance, for {steps} steps; got {nfe}."
        )


@dataclass(slots=True)
class _Search:
    """Trials of policies on the same images."""

    pipe: Pipeline
    scale: float
    jobs: Sequence[Job]
    batch: int
    call: dict[str, object]
    step: Callable[[], None] | None
    # policy -> its error; what is there is not tried again
    known: MutableMapping[Shares, float]
    plain: Tensor = field(init=False)
    trials: int = 0

    def __post_init__(self) -> None:
        self.plain = self.latents((1.0,) * int(str(self.call["num_inference_steps"])))

    def latents(self, shares: Shares) -> Tensor:
        """Final latents of all images, float32 [N, ...]."""
        technique = ScheduledCFG(self.scale, shape="steps", shares=shares)
        call = {**self.call, "output_type": "latent"}
        groups = samples(
            self.pipe, (technique,), self.jobs, batch=self.batch, call=call, step=self.step
        )
        return torch.stack([sample.image for group in groups for sample in group])

    def error(self, shares: Shares) -> float:
        """Mean squared difference of the latents to plain guidance's."""
        if shares not in self.known:
            self.known[shares] = float((self.latents(shares) - self.plain).square().mean())
            self.trials += 1
        return self.known[shares]

    def without(self, shares: Shares, count: int) -> Shares:
        """Guidance is taken from ``count`` more steps: at first a third of them at once, those that
        alone change the images least, then fewer, measured again each time."""
        while count:
            guided = [i for i, share in enumerate(shares) if share]
            order = sorted(guided, key=lambda i: self.error(changed(shares, i, 0.0)))
            for i in order[: max(1, count // 3)]:
                shares = changed(shares, i, 0.0)
                count -= 1
        return shares

    def moved(self, shares: Shares, factors: Sequence[float]) -> Shares:
        """Each guided step's weight is multiplied by the best of ``factors``, once, from the first
        step to the last; 1 is among them."""
        for i, share in enumerate(shares):
            if share:
                options = [shares, *(changed(shares, i, share * factor) for factor in factors)]
                shares = min(options, key=self.error)
        return shares


def changed(shares: Shares, index: int, value: float) -> Shares:
    """``shares`` with another value at one step."""
    return (*shares[:index], value, *shares[index + 1 :])


def search_policy(
    pipe: Pipeline,
    prompts: Sequence[str],
    *,
    scale: float,
    steps: int,
    nfe: int,
    factors: Sequence[float] = FACTORS,
    negative_prompt: str = "",
    batch: int = 16,
    seed: int = 0,
    step: Callable[[], None] | None = None,
    known: MutableMapping[Shares, float] | None = None,
    **call: object,
) -> Policy:
    """The policy of ``nfe`` evaluations per image whose images are nearest to plain guidance's at
    ``scale``, found by trials on the first half of ``prompts`` and checked on the second.

    ``nfe`` between ``steps`` and twice that; ``factors``: multiples of a weight that are tried,
    none to leave all at ``scale``. ``known``: errors of policies that were tried already, filled by
    the search, which goes on where another one stopped. ``seed``: base of the seeds; ``step``:
    called after each step; ``call``: further arguments of the pipeline.
    Cost: about ``most_trials`` generations of half of the prompts. Raises ValueError for a number
    of evaluations that leaves nothing to search, for less than two prompts, and whatever ``apply``
    raises for the pipeline.
    """
    check_policy(nfe, steps, int(getattr(pipe.scheduler, "order", 1)))
    if len(prompts) < 2:
        raise ValueError(f"prompts must be two or more, half to check on; got {len(prompts)}.")
    call |= {"num_inference_steps": steps}
    call |= {"negative_prompt": negative_prompt} if negative_prompt else {}
    jobs = jobs_of(prompts, base=seed)
    half = (len(jobs) + 1) // 2

    def searched(part: Sequence[Job], known: MutableMapping[Shares, float]) -> _Search:
        return _Search(pipe, scale, part, batch, call, step, known)

    search = searched(jobs[:half], {} if known is None else known)
    shares = search.without((1.0,) * steps, 2 * steps - nfe)
    shares = search.moved(shares, factors)
    check = searched(jobs[half:], {})
    return Policy(
        scale=float(scale),
        shares=shares,
        nfe=steps + sum(share != 0 for share in shares),
        error=check.error(shares),
        unguided=check.error((0.0,) * steps),
        error_seen=search.error(shares),
        trials=search.trials,
    )


def most_trials(steps: int, nfe: int, factors: Sequence[float] = FACTORS) -> int:
    """The number of policies that a search tries at most."""
    guided, count, total = steps, 2 * steps - nfe, 0
    while count:
        total += guided
        taken = max(1, count // 3)
        guided, count = guided - taken, count - taken
    return total + guided * len(factors)
