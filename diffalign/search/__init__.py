"""Search: methods that spend further runs on a better image, one per file."""

from diffalign.search.best_of_n import BestOfN
from diffalign.search.dts import DTS, DTSStar
from diffalign.search.smc import SMC

__all__ = ["DTS", "SMC", "BestOfN", "DTSStar"]
