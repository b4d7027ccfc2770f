"""What a search will take, measured on one image before it begins."""

from __future__ import annotations

from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch

from diffalign.alignment.order import Order
from diffalign.alignment.problem import PipelineProblem
from diffalign.core import Budget
from diffalign.core.memory import Peak
from diffalign.core.search import Method
from diffalign.noise_opt.carinox import CARINOX
from diffalign.noise_opt.climber import Climber

MEASURED = " (measured on one image)"


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run for one prompt will take."""

    # of one image alone, finished and scored, with its gradient where the method needs it
    image_seconds: float
    # of the run; None where neither the method nor its budget says when it ends
    seconds: float | None
    # images of the run, None likewise
    images: int | None
    # denoiser rows of one image, without those of a backward pass
    price: int
    # bytes beyond what is in use already, while one image is made; None where nobody counts them
    memory: int | None

    def __str__(self) -> str:
        memory = "" if self.memory is None else f" and {self.memory / 2**20:,.0f} MiB more memory"
        if self.seconds is None or self.images is None:
            return f"{_text(self.image_seconds)} an image of {self.price} NFE{memory}{MEASURED}"
        count = f"{self.images} image{'s' * (self.images != 1)}"
        return f"about {_text(self.seconds)} for {count} of {self.price} NFE{memory}{MEASURED}"


def _text(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def measure(order: Order, prompt: str) -> Forecast:
    """One image of the order on a meter of its own: no seed, budget or image of the run is used.

    A method that needs gradients renders one image with its gradient; of others one evaluation,
    one decode and one score are timed. Batches of several images take less time an image and more
    memory. Cost: as said; the second of two evaluations counts, the first one warms up.
    """
    drive = replace(order, show=None, improved=None).drive(prompt, None)
    problem, method = drive.problem, drive.method
    problem.meter.budget = Budget()
    device = torch.device(getattr(order.pipe, "device", "cpu"))
    try:
        with Peak(device) as peak:
            seconds = _climb(problem, method) if method.needs_gradient else _draw(problem)
    finally:
        problem.progress.use(None)
    price = problem.sampler.price()
    count = images_of(order, price)
    total = None if count is None else (count + 1) * seconds
    limit = None if order.budget is None else order.budget.seconds
    if limit is not None and (total is None or total > limit):
        total, count = limit, max(1, int(limit / seconds) - 1)
    return Forecast(seconds, total, count, price, peak.more)


def images_of(order: Order, price: int) -> int | None:
    """Images of a run by what its method and its budget say, None where neither does."""
    budget, count = order.budget, order.method.total
    limits = [] if count is None else [count]
    if budget is not None:
        limits += [] if budget.nfe is None else [budget.nfe // price - 1]
        limits += [limit - 1 for limit in (budget.rewards, budget.decodes) if limit is not None]
    return max(1, min(limits)) if limits else None


def _climb(problem: PipelineProblem, method: Method[Any]) -> float:
    """Seconds of an image with its gradient."""
    noise = problem.start([0]).latents.float()
    start = perf_counter()
    if isinstance(method, Climber):
        parts = isinstance(method, CARINOX)
        problem.ascend(noise, [0], parts=parts, mode=method.gradient, clamp=method.clamp)
    else:
        problem.ascend(noise, [0])
    return perf_counter() - start


def _draw(problem: PipelineProblem) -> float:
    """Seconds of an image: its evaluations by the time of one, a decode, a score."""
    problem.run(problem.start([0]), 1)
    start = perf_counter()
    state = problem.run(problem.start([0]), 1)
    evaluation = perf_counter() - start
    start = perf_counter()
    if problem.setting.chunked:
        problem.marks(state, problem.prompt)
    else:
        problem.preview(state)
    return evaluation * problem.sampler.count + perf_counter() - start
