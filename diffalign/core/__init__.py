"""Contracts: what a technique, a reward and a sampler are, and what a run costs.

Read from top to bottom: ``types``, ``technique``, ``guidance``, ``attention``, ``blocks``,
``rows``, ``sampler``, ``reward``, ``search``, ``option``, ``registry``, ``budget``. Importing this
room loads nothing, not even torch; it imports nothing else of ours.
"""

from typing import TYPE_CHECKING

from diffalign.core.attention import Attend, AttentionTechnique, Site
from diffalign.core.blocks import BlockSite, BlockTechnique, TokenTechnique
from diffalign.core.budget import Budget, Meter
from diffalign.core.context import Context
from diffalign.core.errors import (
    BudgetExceeded,
    Cancelled,
    GuidanceMismatch,
    SessionError,
    UnsupportedModel,
)
from diffalign.core.guidance import Guidance, TwoBranches
from diffalign.core.option import CALL, FLOW, auto, filled, option
from diffalign.core.reward import Reward
from diffalign.core.rows import Rows, join_rows
from diffalign.core.sampler import Sampler, State, Transition, join
from diffalign.core.search import (
    Ascent,
    Candidate,
    Info,
    Lineage,
    Marks,
    Method,
    Move,
    Node,
    Problem,
    Stage,
    Tree,
)
from diffalign.core.technique import Technique
from diffalign.core.types import CFG_PASSES, COND, UNCOND, Pass, Space, StepInfo, linear_mix
from diffalign.core.window import Windowed

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "CALL",
    "CFG_PASSES",
    "COND",
    "FLOW",
    "UNCOND",
    "Ascent",
    "Attend",
    "AttentionTechnique",
    "BlockSite",
    "BlockTechnique",
    "Budget",
    "BudgetExceeded",
    "Cancelled",
    "Candidate",
    "Context",
    "Guidance",
    "GuidanceMismatch",
    "Info",
    "Lineage",
    "Marks",
    "Meter",
    "Method",
    "Move",
    "Node",
    "Pass",
    "Problem",
    "Reward",
    "Rows",
    "Sampler",
    "SessionError",
    "Site",
    "Space",
    "Stage",
    "State",
    "StepInfo",
    "Technique",
    "Tensor",
    "TokenTechnique",
    "Transition",
    "Tree",
    "TwoBranches",
    "UnsupportedModel",
    "Windowed",
    "auto",
    "filled",
    "join",
    "join_rows",
    "linear_mix",
    "option",
]


def __getattr__(name: str) -> object:
    if name == "Tensor":  # torch's, loaded when a technique asks for it
        from torch import Tensor

        return Tensor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
