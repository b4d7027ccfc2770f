"""One example of every registered technique, acting and neutral, for tests of what stands beside
it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffalign.core import COND, UNCOND, Guidance, Pass, StepInfo, Technique
from diffalign.core.registry import TECHNIQUES
from diffalign.core.types import Keywords, Pipeline
from diffalign.families import family_of
from diffalign.guidance import AutoGuidance
from diffalign.guidance.linear_ag import identity_of
from diffalign.guidance.linear_policy import LinearPolicy, Mode
from diffalign.seams.swap import original_class

ALWAYS = (0.0, math.inf)


class Later:
    """An evaluator that likes later candidates better."""

    sees = "x0"

    def score(self, latents: Tensor, sigma: float, rows: Sequence[int]) -> Tensor:
        """The index of each candidate: [len(rows)]."""
        return torch.arange(float(len(rows)))


@dataclass(frozen=True, slots=True)
class FirstImage(Guidance[None]):
    """Guides the first image of a batch only, as adaptive rules do once others are done."""

    def passes(self, step: StepInfo, state: None) -> tuple[Pass, ...]:
        return (COND, replace(UNCOND, rows=(0,)))

    def combine(
        self, preds: Mapping[Pass, Tensor], step: StepInfo, state: None
    ) -> tuple[Tensor, None]:
        guided = preds[COND].clone()
        guided[:1] = step.mix(preds[COND][:1], preds[UNCOND], 4.0)
        return guided, None


FURTHER: Mapping[str, type[Technique]] = {"some images": FirstImage}
"""Ways of acting that no registered technique shows in a short run."""
ACTING: Mapping[str, Keywords] = {
    "adaptive-guidance": {"threshold": -1.0, "min_guided_steps": 1},
    "cat": {"keep": 0.5, "start": 2},
    "cfg": {"scale": 4.0},
    "dynamic-cfg": {"scale": 3.0, "candidates": (1.0, 4.0), "evaluators": (Later(),)},
    "interval-cfg": {"stop": 0.5},
    "nag": {"scale": 4.0, "tau": 1.6, "alpha": 0.7, "sigma": ALWAYS},
    "s2-guidance": {"blocks": ("*",), "start": 0.0, "stop": 1.0},
    "skip-layer-guidance": {"layers": (0,), "start": 0.0, "stop": 1.0},
}
"""Options with which a technique acts at some of three steps; the others act by default."""

REACH: Mapping[str, float] = {"nag": 7.0, "pladis": 3.0}
"""How far attention outputs are extrapolated: at scale ``w`` rounding differences of both outputs
are multiplied by up to ``w + (w - 1)``."""

FAINT: Mapping[str, Keywords] = {
    "nag": {**ACTING["nag"], "alpha": 1e-7},
    "pag": {"pag_scale": 1e-7},
    "pladis": {"strength": 1e-7},
    "seg": {"seg_scale": 1e-7},
    "s2-guidance": {**ACTING["s2-guidance"], "omega": 1e-7},
    "skip-layer-guidance": {**ACTING["skip-layer-guidance"], "slg_scale": 1e-7},
}
"""Options with which a technique runs everything that it needs and changes almost nothing."""


class Neutral(NamedTuple):
    """Options that switch a technique off, and what the pipeline then does."""

    options: Keywords
    branch: Literal["both", "cond"]


NEUTRAL: Mapping[str, Neutral] = {
    "adaptive-guidance": Neutral({"threshold": 1.5}, "both"),
    "beta-cfg": Neutral({"a": 1.0, "b": 1.0, "gamma": 0.0}, "both"),
    "cat": Neutral({"keep": 1.0}, "both"),
    "cfg": Neutral({}, "both"),
    "dynamic-cfg": Neutral({"candidates": (3.0,)}, "both"),
    "interval-cfg": Neutral({"sigma": ALWAYS}, "both"),
    "magnitude-aware": Neutral({"alpha": 0.0}, "both"),
    "nag": Neutral({"scale": 1.0}, "both"),
    "pag": Neutral({"pag_scale": 0.0}, "both"),
    "pladis": Neutral({"strength": 0.0}, "both"),
    "rescaled-cfg": Neutral({"phi": 0.0}, "both"),
    "s2-guidance": Neutral({"blocks": ("*",), "omega": 0.0}, "both"),
    "scheduled-cfg": Neutral({"shape": "constant"}, "both"),
    "seg": Neutral({"seg_scale": 0.0}, "both"),
    "skip-layer-guidance": Neutral({"layers": (0,), "slg_scale": 0.0, "stop": 1.0}, "both"),
    "apg": Neutral({"scale": 1.0}, "cond"),
    "cfg-zero-star": Neutral({"scale": 1.0, "zero_steps": 0}, "cond"),
    "fdg": Neutral({"scale": 1.0}, "cond"),
    "tcfg": Neutral({"scale": 1.0}, "cond"),
}
"""The pipeline's own guidance ("both"), or its own result without guidance ("cond")."""


def acting(name: str, pipe: Pipeline, shape: Sequence[int], steps: int, folder: Path) -> Technique:
    """The technique of that name with an effect on a call of ``steps`` steps.

    ``shape``: of one image's prediction, and ``folder``: for a policy of LinearAG, which is fitted
    to one model and one setting.
    """
    if name in FURTHER:
        return FURTHER[name]()
    if name == "linear-ag":
        identity = identity_of(pipe, steps, 3.0, tuple(shape), "")
        last: Mode = "conditional"
        rest = tuple(last for _ in range(steps - 2))
        plan: tuple[Mode, ...] = ("guided", "estimated", *rest)
        weights = {1: torch.tensor([0.1, 0.5, 0.4], dtype=torch.float64)}
        LinearPolicy(identity, plan, weights, {}, {}, 0).save(folder / "policy")
        return TECHNIQUES.build(name, {"scale": 3.0, "policy": str(folder / "policy")})
    if name == "auto-guidance":
        return weakened(pipe)
    return TECHNIQUES.build(name, ACTING.get(name, {}))


def weakened(pipe: Pipeline, weak: Pipeline | None = None) -> AutoGuidance:
    """AutoGuidance by the denoiser of ``weak``; None is a copy of the pipeline's own with smaller
    weights."""
    name = family_of(original_class(pipe)).denoisers[0]
    if weak is not None:
        return AutoGuidance(3.0, weak=getattr(weak, name))
    module = deepcopy(getattr(pipe, name))
    weaken(module)
    return AutoGuidance(3.0, weak=module)


def weaken(denoiser: torch.nn.Module) -> None:
    """Make its weights smaller."""
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.mul_(0.9)


def class_of(name: str) -> type[Technique]:
    """The class of an example."""
    cls = FURTHER.get(name) or TECHNIQUES.get(name)
    assert isinstance(cls, type)
    return cls


def faint(name: str) -> Technique | None:
    """The technique with almost no effect, None where it has no weight of its own."""
    return TECHNIQUES.build(name, FAINT[name]) if name in FAINT else None


def neutral(name: str) -> tuple[Technique, Literal["both", "cond"]] | None:
    """The technique switched off, and which plain result it must then equal; None where it cannot
    be switched off."""
    if name not in NEUTRAL:
        return None
    return TECHNIQUES.build(name, NEUTRAL[name].options), NEUTRAL[name].branch
