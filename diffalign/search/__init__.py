"""Search: methods that spend further runs on a better image, one per file."""

from diffalign.search.beam import Beam
from diffalign.search.best_of_n import BestOfN
from diffalign.search.draft_commit import DraftCommit
from diffalign.search.dts import DTS, DTSStar
from diffalign.search.linear_search import LinearSearch
from diffalign.search.path_search import PathSearch
from diffalign.search.prompt_search import PromptSearch
from diffalign.search.rbf import RBF
from diffalign.search.smc import SMC
from diffalign.search.tree_of_frames import TreeOfFrames
from diffalign.search.zero_order import ZeroOrder

__all__ = [
    "DTS",
    "RBF",
    "SMC",
    "Beam",
    "BestOfN",
    "DTSStar",
    "DraftCommit",
    "LinearSearch",
    "PathSearch",
    "PromptSearch",
    "TreeOfFrames",
    "ZeroOrder",
]
