"""Short names for diffusers schedulers, checked against the one that the pipeline comes with."""

import copy

from diffalign.core.errors import nearest
from diffalign.core.types import Pipeline, Scheduler
from diffalign.generate.errors import BadOption

NAMES = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "dpm++-single": "DPMSolverSinglestepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
FLOW = {"euler": "FlowMatchEulerDiscreteScheduler"}


def class_name(name: str, current: str) -> str:
    """The scheduler class for ``name`` on a pipeline that comes with the class ``current``.

    Raises ``BadOption`` for an unknown name, and where it cannot replace the current one.
    """
    import diffusers

    if name not in NAMES:
        raise BadOption("scheduler", f"unknown name {name!r}. Nearest: {nearest(name, NAMES)}.")
    target = NAMES[name]
    if FLOW.get(name) == current or target == current:
        return current
    compatible = getattr(getattr(diffusers, current, None), "_compatibles", [])
    if target in compatible:
        return target
    fitting = sorted(
        n for n, c in NAMES.items() if c in (current, *compatible) or FLOW.get(n) == current
    )
    raise BadOption(
        "scheduler",
        f"{name} ({target}) cannot replace this model's {current}; "
        f"{', '.join(fitting) or 'leave the option out'} can be used.",
    )


def replace(pipe: Pipeline, target: str) -> None:
    """Give the pipeline a scheduler of the class ``target`` with the configuration of the one it
    has."""
    import diffusers

    if type(pipe.scheduler).__name__ == target:
        return
    config = pipe.scheduler.config
    if config.get("prediction_type") == "flow_prediction" and target not in (
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
    ):
        raise BadOption(
            "scheduler",
            f"{target} cannot sample this flow model; use dpm++ or unipc, or leave the option out.",
        )
    pipe.scheduler = getattr(diffusers, target).from_config(config)


def check_steps(scheduler: Scheduler, steps: int) -> None:
    """Raise ``BadOption`` when the scheduler has no ``steps`` steps to give."""
    try:
        copy.deepcopy(scheduler).set_timesteps(steps)
    # others, like the shift that flow models compute from the image size, are the pipeline's to
    # give
    except ValueError as error:
        if "num_inference_steps" in str(error):
            most = scheduler.config.num_train_timesteps
            raise BadOption(
                "steps", f"{type(scheduler).__name__} has at most {most} steps; got {steps}."
            ) from error
