"""Align: extra runs of a pipeline for a better image, through one door."""

from diffalign.align.door import align
from diffalign.align.result import Ledger, Result

__all__ = ["Ledger", "Result", "align"]
