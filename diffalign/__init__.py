"""diffalign: inference-time alignment and guidance for Hugging Face diffusers pipelines."""

from .core import Budget
from .guidance import CFG

__version__ = "0.1.0"
__all__ = ["CFG", "Budget"]
