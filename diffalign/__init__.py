"""diffalign: inference-time alignment and guidance for Hugging Face diffusers pipelines."""

from .adapters import Report, Session, active, apply, disable, enable, supports, techniques_of
from .attention import NAG, PLADIS
from .core import Budget, BudgetExceeded, Cancelled, GuidanceMismatch, SessionError, UnsupportedModel
from .core.registry import methods
from .guidance import CFG

__version__ = "0.1.0"
__all__ = [
    "CFG",
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
    "disable",
    "enable",
    "methods",
    "supports",
    "techniques_of",
]
