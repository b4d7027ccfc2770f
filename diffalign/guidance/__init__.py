"""Guidance techniques: one file each. ``base.py`` is the contract, ``cfg.py`` the smallest example."""

from .adaptive_guidance import AdaptiveGuidance
from .apg import APG
from .base import Guidance
from .beta_cfg import BetaCFG
from .cfg import CFG
from .cfg_plus_plus import CFGPlusPlus
from .cfg_zero_star import CFGZeroStar
from .dynamic_cfg import DynamicCFG
from .evaluators import DecodedReward, Evaluator
from .interval_cfg import IntervalCFG
from .linear_ag import LinearAG
from .magnitude_aware import MagnitudeAware
from .rescaled_cfg import RescaledCFG
from .s2_guidance import S2Guidance
from .scheduled_cfg import ScheduledCFG
from .skip_layer_guidance import SkipLayerGuidance
from .tcfg import TCFG

__all__ = [
    "APG",
    "CFG",
    "TCFG",
    "AdaptiveGuidance",
    "BetaCFG",
    "CFGPlusPlus",
    "CFGZeroStar",
    "DecodedReward",
    "DynamicCFG",
    "Evaluator",
    "Guidance",
    "IntervalCFG",
    "LinearAG",
    "MagnitudeAware",
    "RescaledCFG",
    "S2Guidance",
    "ScheduledCFG",
    "SkipLayerGuidance",
]
