"""Search: methods that spend further runs on a better image, one per file."""

from diffalign.search.best_of_n import BestOfN

__all__ = ["BestOfN"]
