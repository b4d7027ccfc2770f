"""Attention techniques: one file each. ``base.py`` is the contract, ``pladis.py`` the smallest example."""

from .base import AttentionTechnique
from .nag import NAG
from .pladis import PLADIS

__all__ = ["NAG", "PLADIS", "AttentionTechnique"]
