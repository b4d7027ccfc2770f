"""Attention techniques: one file each. ``core.attention`` is the contract, ``pladis.py`` the
smallest example."""

from diffalign.attention.nag.nag import NAG
from diffalign.attention.pladis import PLADIS

__all__ = ["NAG", "PLADIS"]
