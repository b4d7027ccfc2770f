"""CFG++: guided denoising, unconditional re-noising."""

from dataclasses import KW_ONLY, dataclass
from typing import Self

from diffalign.core import FLOW, Context, StepInfo, UnsupportedModel, auto, filled, option
from diffalign.guidance.cfg import WeightedCFG

FIRST_ORDER = ("DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler")


@dataclass(frozen=True, slots=True)
class CFGPlusPlus(WeightedCFG):
    """Samples by CFG++, as a guidance weight: exact on deterministic first-order samplers.

    Chung et al. 2024, arXiv:2406.08070. CFG++ denoises with ``u + lam * (c - u)`` and adds the
    *unconditional* noise back. In ``y = x0 + sigma * eps`` one step is ``y - sigma * (u + lam (c -
    u)) + sigma_next * u``, which is the ordinary first-order step with the guidance weight ``lam *
    sigma / (sigma - sigma_next)``; for flow models, where sigma is in [0, 1], that is multiplied by
    ``1 - sigma_next``. Equal to CFG++ for DDIM with ``eta=0`` and without clipping, and for Euler
    without churn.
    Cost: 2 passes per step; 1 where the weight is exactly 0 or 1.
    Raises: ``UnsupportedModel`` for any other scheduler, whose step is not this formula, and on
    Cosmos 2.
    """

    lam: float = option(
        0.6, "0 is the unconditional model; 0.6 stands for a usual CFG scale", low=0.0, high=1.0
    )
    _: KW_ONLY
    flow: bool = auto(FLOW, "whether noise levels are those of a flow model")

    def resolve(self, context: Context) -> Self:
        if context.scheduler not in FIRST_ORDER:
            raise UnsupportedModel(
                f"CFGPlusPlus changes the sampler and is exact for {', '.join(FIRST_ORDER)} only; "
                f"this pipeline uses {context.scheduler}. "
                "Use one of those: pipe.scheduler = "
                "DDIMScheduler.from_config(pipe.scheduler.config)."
            )
        return filled(self, context)

    def weight(self, step: StepInfo) -> float:
        """The equivalent guidance weight at this step."""
        if not step.sigma_next < step.sigma:
            raise ValueError(
                f"CFGPlusPlus needs falling noise levels; step {step.index} goes from "
                f"{step.sigma:g} to {step.sigma_next:g}."
            )
        remaining = 1.0 - step.sigma_next if self.flow else 1.0
        return self.lam * step.sigma * remaining / (step.sigma - step.sigma_next)
