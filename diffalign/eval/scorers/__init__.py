"""Scorers: what looks at images and says how well they show their prompts."""

from diffalign.eval.scorers.base import NAMES, Outcome, Scorer, load_scorer

__all__ = ["NAMES", "Outcome", "Scorer", "load_scorer"]
