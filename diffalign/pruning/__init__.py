"""Token pruning: one file per technique. ``core.blocks.TokenTechnique`` is the contract."""

from diffalign.pruning.cat import CAT

__all__ = ["CAT"]
