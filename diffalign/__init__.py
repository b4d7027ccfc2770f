"""diffalign: inference-time alignment and guidance for Hugging Face diffusers pipelines."""

from diffalign import core, rewards
from diffalign.attention import NAG, PLADIS
from diffalign.core import (
    Budget,
    BudgetExceeded,
    Cancelled,
    GuidanceMismatch,
    SessionError,
    UnsupportedModel,
)
from diffalign.core.registry import techniques
from diffalign.embedded import load
from diffalign.guidance import *  # noqa: F403
from diffalign.guidance import __all__ as _guidance
from diffalign.seams import (
    Report,
    Session,
    active,
    apply,
    disable,
    enable,
    guider,
    preset,
    supports,
    techniques_of,
)

__version__ = "0.1.0"
__all__ = [
    "NAG",
    "PLADIS",
    "Budget",
    "BudgetExceeded",
    "Cancelled",
    "GuidanceMismatch",
    "Report",
    "Session",
    "SessionError",
    "UnsupportedModel",
    "active",
    "apply",
    "core",
    "disable",
    "enable",
    "guider",
    "load",
    "techniques",
    "preset",
    "rewards",
    "supports",
    "techniques_of",
    *_guidance,
]
