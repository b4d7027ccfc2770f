"""diffalign: inference-time alignment and guidance for Hugging Face diffusers pipelines.

Importing the package loads nothing else; every public name is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:  # what type checkers and editors see; a test compares it with the table below
    from diffalign import core as core
    from diffalign import rewards as rewards
    from diffalign.alignment import align as align
    from diffalign.attention import NAG as NAG
    from diffalign.attention import PLADIS as PLADIS
    from diffalign.core import Budget as Budget
    from diffalign.core import BudgetExceeded as BudgetExceeded
    from diffalign.core import Cancelled as Cancelled
    from diffalign.core import Guidance as Guidance
    from diffalign.core import GuidanceMismatch as GuidanceMismatch
    from diffalign.core import SessionError as SessionError
    from diffalign.core import UnsupportedModel as UnsupportedModel
    from diffalign.core.registry import methods as methods
    from diffalign.core.registry import register as register
    from diffalign.core.registry import techniques as techniques
    from diffalign.embedded import load as load
    from diffalign.guidance import *  # noqa: F403
    from diffalign.noise_opt import *  # noqa: F403
    from diffalign.pruning import CAT as CAT
    from diffalign.seams import Report as Report
    from diffalign.seams import Session as Session
    from diffalign.seams import active as active
    from diffalign.seams import apply as apply
    from diffalign.seams import disable as disable
    from diffalign.seams import enable as enable
    from diffalign.seams import guider as guider
    from diffalign.seams import preset as preset
    from diffalign.seams import supports as supports
    from diffalign.seams import techniques_of as techniques_of
    from diffalign.seams.trajectory.kernels import Eta as Eta
    from diffalign.seams.trajectory.kernels import FlowSDE as FlowSDE
    from diffalign.seams.trajectory.kernels import Native as Native
    from diffalign.seams.trajectory.kernels import VPFlow as VPFlow
    from diffalign.search import *  # noqa: F403

_ROOMS = ("core", "rewards")
_WHOLE = (
    "diffalign.guidance",
    "diffalign.noise_opt",
    "diffalign.search",
)  # modules whose ``__all__`` is public here
_NAMES = {
    "diffalign.alignment": ("align",),
    "diffalign.attention": ("NAG", "PLADIS"),
    "diffalign.core": (
        "Budget",
        "BudgetExceeded",
        "Cancelled",
        "Guidance",
        "GuidanceMismatch",
        "SessionError",
        "UnsupportedModel",
    ),
    "diffalign.core.registry": ("methods", "register", "techniques"),
    "diffalign.embedded": ("load",),
    "diffalign.pruning": ("CAT",),
    "diffalign.seams": (
        "Report",
        "Session",
        "active",
        "apply",
        "disable",
        "enable",
        "guider",
        "preset",
        "supports",
        "techniques_of",
    ),
    "diffalign.seams.trajectory.kernels": ("Eta", "FlowSDE", "Native", "VPFlow"),
}


def _home(name: str) -> str:
    """The module of a public name. Raises AttributeError for other names."""
    for module, names in _NAMES.items():
        if name in names:
            return module
    for module in _WHOLE:
        if name in import_module(module).__all__:
            return module
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if not TYPE_CHECKING:

    def __getattr__(name):
        if name == "__all__":
            value = [*_ROOMS, *(name for names in _NAMES.values() for name in names)]
            value += [name for module in _WHOLE for name in import_module(module).__all__]
        elif name.startswith("_"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        elif name in _ROOMS:
            value = import_module(f"{__name__}.{name}")
        else:
            value = getattr(import_module(_home(name)), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__getattr__("__all__")})
