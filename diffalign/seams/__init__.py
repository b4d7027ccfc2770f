"""All knowledge of diffusers pipelines: the registry of families, the tap on the denoiser,
sessions. Nothing else touches diffusers."""

from diffalign.seams.choices import preset
from diffalign.seams.guiders_out import guider
from diffalign.seams.report import Report
from diffalign.seams.session import Session, active, apply, disable, enable, techniques_of
from diffalign.seams.support import Support, SupportTable, supports

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
