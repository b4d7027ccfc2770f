"""diffalign: inference-time alignment and guidance for Hugging Face diffusers pipelines."""

from . import core, rewards
from .adapters import Report, Session, active, apply, disable, enable, guider, preset, supports, techniques_of
from .attention import NAG, PLADIS
from .core import Budget, BudgetExceeded, Cancelled, GuidanceMismatch, SessionError, UnsupportedModel
from .core.registry import methods
from .embedded import load
from .guidance import *  # noqa: F403
from .guidance import __all__ as _guidance

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
    "methods",
    "preset",
    "rewards",
    "supports",
    "techniques_of",
    *_guidance,
]
