"""Guidance techniques: one file each. ``base.py`` is the contract, ``cfg.py`` the smallest example."""

from .base import Guidance
from .cfg import CFG

__all__ = ["CFG", "Guidance"]
