"""Align: extra runs of a pipeline for a better image, through one door."""

from diffalign.alignment.door import align
from diffalign.alignment.forecast import Forecast
from diffalign.alignment.result import Ledger, Result

__all__ = ["Forecast", "Ledger", "Result", "align"]
