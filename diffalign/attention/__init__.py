"""Attention techniques: one file each. ``base.py`` is the contract, ``pladis.py`` the smallest
example."""

from diffalign.attention.nag.nag import NAG
from diffalign.attention.pladis import PLADIS
from diffalign.seams.attention.base import AttentionTechnique

__all__ = ["NAG", "PLADIS", "AttentionTechnique"]
