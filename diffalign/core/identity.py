"""Which model is this: a cheap hash of its weights."""

from __future__ import annotations

import hashlib
from typing import Any

from diffalign.core.errors import UnsupportedModel


def model_hash(module: Any) -> str:
    """Hash of a denoiser's class, shapes and the first values of every tensor, 16 hex digits.

    Cost: a few bytes of each tensor, so it is cheap for billions of parameters.
    Raises: ``UnsupportedModel`` where the weights are not in memory (sequential offload).
    """
    import torch

    module = getattr(module, "_orig_mod", module)
    digest = hashlib.sha256(type(module).__name__.encode())
    for name, tensor in sorted(module.state_dict().items()):
        if tensor.is_meta:
            raise UnsupportedModel(
                f"{type(module).__name__} cannot be recognised: {name} is offloaded. Use "
                "enable_model_cpu_offload instead."
            )
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().flatten()[:4].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]
