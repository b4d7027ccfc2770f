"""All knowledge of diffusers pipelines: the registry of families, the tap on the denoiser, sessions. Nothing else touches diffusers."""

from .modular import guider
from .preset import preset
from .report import Report
from .session import Session, active, apply, disable, enable, techniques_of
from .supports import Support, SupportTable, supports

__all__ = [
    "Report",
    "Session",
    "Support",
    "SupportTable",
    "active",
    "apply",
    "disable",
    "enable",
    "guider",
    "preset",
    "supports",
    "techniques_of",
]
