"""Types, costs, errors and the registry. Imports torch and nothing else of ours."""

from diffalign.core.budget import Budget, Meter
from diffalign.core.context import Context
from diffalign.core.errors import (
    BudgetExceeded,
    Cancelled,
    GuidanceMismatch,
    SessionError,
    UnsupportedModel,
)
from diffalign.core.types import (
    COND,
    UNCOND,
    Pass,
    Reward,
    Sampler,
    Search,
    Site,
    Space,
    StepInfo,
    Tensor,
    linear_mix,
)
from diffalign.core.window import Windowed

__all__ = [
    "COND",
    "UNCOND",
    "Budget",
    "BudgetExceeded",
    "Cancelled",
    "Context",
    "GuidanceMismatch",
    "Meter",
    "Pass",
    "Reward",
    "Sampler",
    "Search",
    "SessionError",
    "Site",
    "Space",
    "StepInfo",
    "Tensor",
    "UnsupportedModel",
    "Windowed",
    "linear_mix",
]
