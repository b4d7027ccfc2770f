"""CFG++: guided denoising, unconditional re-noising (Chung et al. 2024, arXiv:2406.08070)."""

import dataclasses
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Self

from diffalign.core import COND, UNCOND, Context, Pass, StepInfo, Tensor, UnsupportedModel
from diffalign.core.checks import check_range
from diffalign.guidance.base import Guidance
from diffalign.guidance.cfg import CFG

FIRST_ORDER = ("DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler")


@dataclass(frozen=True, slots=True)
class CFGPlusPlus(Guidance[None]):
    """The CFG++ sampler as a guidance schedule, exact on deterministic first-order samplers (Chung
    et al. 2024, arXiv:2406.08070).

    CFG++ denoises with ``u + lam * (c - u)`` and adds the *unconditional* noise back. In ``y = x0 +
    sigma * eps`` one step is ``y - sigma * (u + lam (c - u)) + sigma_next * u``, which is the
    ordinary first-order step with the guidance weight ``lam * sigma / (sigma - sigma_next)``; for
    flow models, where sigma is in [0, 1], that is multiplied by ``1 - sigma_next``. ``lam`` in [0,
    1]: 0 is the unconditional model; 0.6 stands for a usual CFG scale. ``flow``: None as the
    scheduler says. Equal to CFG++ for DDIM with ``eta=0`` and without clipping, and for Euler
    without churn.
    Cost: 2 passes per step; 1 where the weight is exactly 0 or 1. Raises ``UnsupportedModel`` for
    any other scheduler, whose step is not this formula, and on Cosmos 2.
    """

    lam: float = 0.6
    _: KW_ONLY
    flow: bool | None = None

    def __post_init__(self) -> None:
        check_range("CFGPlusPlus", "lam", self.lam, 0.0, 1.0)

    def resolve(self, context: Context) -> tuple[Self, dict[str, str]]:
        if context.scheduler not in FIRST_ORDER:
            raise UnsupportedModel(
                f"CFGPlusPlus changes the sampler and is exact for {', '.join(FIRST_ORDER)} only; "
                f"this pipeline uses {context.scheduler}. "
                "Use one of those: pipe.scheduler = "
                "DDIMScheduler.from_config(pipe.scheduler.config)."
            )
        if self.flow is not None:
            return self, {}
        return dataclasses.replace(self, flow=context.flow), {
            "flow": f"parametrisation of {context.scheduler}"
        }

    def weight(self, step: StepInfo) -> float:
        """The equivalent guidance weight at this step."""
        if not step.sigma_next < step.sigma:
            raise ValueError(
                f"CFGPlusPlus needs falling noise levels; step {step.index} goes from "
                f"{step.sigma:g} to {step.sigma_next:g}."
            )
        kept = 1.0 - step.sigma_next if self.flow else 1.0
        return self.lam * step.sigma * kept / (step.sigma - step.sigma_next)

    def passes(self, step: StepInfo, state: None) -> tuple[Pass, ...]:
        return CFG(self.weight(step)).passes(step, None)

    def combine(
        self, preds: Mapping[Pass, Tensor], step: StepInfo, state: None
    ) -> tuple[Tensor, None]:
        if len(preds) == 1:
            return next(iter(preds.values())), None
        return step.mix(preds[COND], preds[UNCOND], self.weight(step)), None
