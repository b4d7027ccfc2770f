"""Guidance techniques: one file each. ``base.py`` is the contract, ``cfg.py`` the smallest example."""

from .adaptive_guidance import AdaptiveGuidance
from .base import Guidance
from .cfg import CFG
from .interval_cfg import IntervalCFG
from .scheduled_cfg import ScheduledCFG

__all__ = ["CFG", "AdaptiveGuidance", "Guidance", "IntervalCFG", "ScheduledCFG"]
