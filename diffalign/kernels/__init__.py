"""Attention kernels: plain torch truths (``naive.py``), faster torch paths and fused Triton forms,
one folder per operation.

``entmax`` sparse maps, ``nag`` the epilogue of normalised attention guidance, ``pladis``
dense-sparse cross-attention, ``selection`` which tokens a step computes, ``tokens`` keys and values
of some tokens among those of all. Each folder's ``choose`` returns what a call site calls and the
reason; ``agreement`` compares what runs on a device with the truth. Importing this package does not
import Triton.
"""

from diffalign.kernels.choice import Backend, Choice

__all__ = ["Backend", "Choice"]
