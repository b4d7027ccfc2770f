"""What people have on a pipeline, as tests put it there: adapters, controls, caches, compilers,
offloading, wrappers, backends.

``NEIGHBOURS`` lists them; a new one is an entry in the list of its module. ``check.Cells`` checks
every technique beside one of them.
"""

from diffalign.testing.beside import (
    adapters,
    backends,
    caches,
    compilers,
    controls,
    memory,
    wrappers,
)
from diffalign.testing.beside.base import Neighbour, Part, Refusal

__all__ = ["NEIGHBOURS", "Neighbour", "Part", "Refusal"]

NEIGHBOURS: tuple[Neighbour, ...] = (
    *adapters.NEIGHBOURS,
    *controls.NEIGHBOURS,
    *caches.NEIGHBOURS,
    *compilers.NEIGHBOURS,
    *memory.NEIGHBOURS,
    *wrappers.NEIGHBOURS,
    *backends.NEIGHBOURS,
)
