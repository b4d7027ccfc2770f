"""What a technique may know about the pipeline before the first step."""

from dataclasses import dataclass, field
from typing import Any

from diffalign.core.budget import Meter


@dataclass(frozen=True, slots=True)
class Context:
    """Facts that resolve a technique's ``None`` options.

    ``scale``: the pipeline's own guidance scale for this call, ``scale_source``: "call" or
    "pipeline default". ``steps``: sampling steps asked for. ``flow``: sigma is in [0, 1].
    ``order``: model evaluations per solver step. ``family``: e.g. "sd", "sdxl", "flux";
    ``pipeline``, ``scheduler``: class names. ``denoiser``: attribute name. ``negative_prompt``: of
    the call when it is one text, or one text for every image; None otherwise. ``module``: the
    denoiser itself, None where a technique runs without a pipeline; ``pipe`` likewise. ``prompts``:
    one text per image, empty where the call gives none (embeddings) and outside a call. ``meter``:
    what the run is charged with; None outside a call.
    """

    pipeline: str
    family: str
    denoiser: str
    scheduler: str
    scale: float
    scale_source: str
    steps: int
    batch: int
    flow: bool = False
    order: int = 1
    negative_prompt: str | None = None
    module: Any = field(default=None, compare=False, repr=False)
    pipe: Any = field(default=None, compare=False, repr=False)
    prompts: tuple[str, ...] = ()
    meter: Meter | None = field(default=None, compare=False, repr=False)
