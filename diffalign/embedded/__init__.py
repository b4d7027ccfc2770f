"""Models that ship with the package, the small world they live in, and the scripts that trained
them.

``load(name)`` gives a model, ``available()`` lists what is installed. Importing this package loads
neither torch nor a model.
"""

from diffalign.embedded.load import Available, available, load

__all__ = ["Available", "available", "load"]
