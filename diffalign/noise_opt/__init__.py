"""Noise optimisation: methods that improve the start noise, or the text, one per file."""

from diffalign.noise_opt.carinox import CARINOX
from diffalign.noise_opt.find import FIND
from diffalign.noise_opt.pez import PEZ
from diffalign.noise_opt.policy import NoisePolicy
from diffalign.noise_opt.random_search import RandomSearch
from diffalign.noise_opt.reno import ReNO
from diffalign.noise_opt.sage import SAGE

__all__ = ["CARINOX", "FIND", "PEZ", "SAGE", "NoisePolicy", "RandomSearch", "ReNO"]
