"""Noise optimisation: methods that improve the start noise, one per file."""

from diffalign.noise_opt.reno import ReNO

__all__ = ["ReNO"]
