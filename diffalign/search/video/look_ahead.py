"""What a chunk will look like, read in the pipeline's own callback while it is made."""

from __future__ import annotations

from torch import Tensor

from diffalign.core.types import Keywords, Pipeline, Scheduler
from diffalign.seams.swap import original_class


def reads(scheduler: Scheduler) -> bool:
    """Whether the clean latents that a step predicts can be read after it."""
    return _keeps_clean(scheduler) or _is_straight(scheduler)


def first_read(scheduler: Scheduler) -> int:
    """The first evaluation after which they can be read: Euler needs the latents before a step,
    and nothing is known of those before the first."""
    return 1 if _keeps_clean(scheduler) else 2


def _keeps_clean(scheduler: Scheduler) -> bool:
    """Whether the scheduler's history holds clean latents, as that of UniPC does."""
    config = scheduler.config
    if not hasattr(scheduler, "model_outputs") or config.get("scheduler_type") == "euler":
        return False
    return bool(
        config.get("predict_x0", False)
        or config.get("algorithm_type") in ("dpmsolver++", "sde-dpmsolver++")
    )


def _is_straight(scheduler: Scheduler) -> bool:
    """Whether a step goes along a straight line to the clean latents: Euler on a flow."""
    name = original_class(scheduler).__name__
    return name == "FlowMatchEulerDiscreteScheduler" and not scheduler.config.get(
        "stochastic_sampling", False
    )


class LookAhead:
    """A ``callback_on_step_end`` that ends the run after ``step`` evaluations, with the clean
    latents that the model then predicts in place of the noisy ones: the pipeline decodes those.

    It asks the pipeline to skip the other steps, as ``pipe._interrupt`` does.
    Raises: ValueError at step 1 of a scheduler that keeps no history, where nothing is known of
    the latents before it.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self._before: Tensor | None = None

    def __call__(self, pipe: Pipeline, index: int, time: object, values: Keywords) -> Keywords:
        latents: Tensor = values["latents"]
        if index + 1 < self.step:
            self._before = latents
            return {}
        pipe._interrupt = True
        before, self._before = self._before, None
        return {"latents": _clean(pipe.scheduler, index, before, latents)}


def _clean(scheduler: Scheduler, index: int, before: Tensor | None, latents: Tensor) -> Tensor:
    if _keeps_clean(scheduler):
        value: Tensor = scheduler.model_outputs[-1]
        return value.to(latents.dtype)
    if before is None:
        raise ValueError(
            f"preview(step=1): {original_class(scheduler).__name__} keeps nothing of the latents "
            "before the first step; use step=2 or more."
        )
    high, low = float(scheduler.sigmas[index]), float(scheduler.sigmas[index + 1])
    return latents - low * (latents - before) / (low - high)
