"""diffalign: inference-time alignment and guidance for Hugging Face diffusers pipelines."""

from .adapters import Report, Session, active, apply, disable, enable, techniques_of
from .core import Budget
from .guidance import CFG

__version__ = "0.1.0"
__all__ = ["CFG", "Budget", "Report", "Session", "active", "apply", "disable", "enable", "techniques_of"]
