"""Guidance techniques: one file each. ``core/guidance.py`` is the contract, ``cfg.py`` the smallest
example."""

from diffalign.guidance.adaptive_guidance import AdaptiveGuidance
from diffalign.guidance.apg import APG
from diffalign.guidance.auto_guidance import AutoGuidance
from diffalign.guidance.beta_cfg import BetaCFG
from diffalign.guidance.cfg import CFG
from diffalign.guidance.cfg_plus_plus import CFGPlusPlus
from diffalign.guidance.cfg_zero_star import CFGZeroStar
from diffalign.guidance.dynamic_cfg import DynamicCFG
from diffalign.guidance.evaluators import DecodedReward, Evaluator
from diffalign.guidance.fdg import FDG
from diffalign.guidance.interval_cfg import IntervalCFG
from diffalign.guidance.linear_ag import LinearAG
from diffalign.guidance.magnitude_aware import MagnitudeAware
from diffalign.guidance.pag import PAG
from diffalign.guidance.rescaled_cfg import RescaledCFG
from diffalign.guidance.s2_guidance import S2Guidance
from diffalign.guidance.scheduled_cfg import ScheduledCFG
from diffalign.guidance.seg import SEG
from diffalign.guidance.skip_layer_guidance import SkipLayerGuidance
from diffalign.guidance.tcfg import TCFG

__all__ = [
    "APG",
    "CFG",
    "FDG",
    "PAG",
    "SEG",
    "TCFG",
    "AdaptiveGuidance",
    "AutoGuidance",
    "BetaCFG",
    "CFGPlusPlus",
    "CFGZeroStar",
    "DecodedReward",
    "DynamicCFG",
    "Evaluator",
    "IntervalCFG",
    "LinearAG",
    "MagnitudeAware",
    "RescaledCFG",
    "S2Guidance",
    "ScheduledCFG",
    "SkipLayerGuidance",
]
