"""Which model is this: a cheap hash of its weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from diffalign.core.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

# copies of other weights that fused projections add
FUSED = re.compile(r"\.to_(qkv|kv|added_qkv)\.")
ADAPTER = re.compile(r"\.lora_\w+\.")
WRAPPERS = ("_orig_mod", "module")

# id of a model whose weights do not change meanwhile -> its hash; None outside ``remembered``
_KNOWN: ContextVar[dict[int, str] | None] = ContextVar("diffalign_hashes", default=None)


@contextmanager
def remembered(hashes: dict[int, str]) -> Iterator[None]:
    """Within the block no model is hashed twice; ``hashes`` keeps them from block to block."""
    token = _KNOWN.set(hashes)
    try:
        yield
    finally:
        _KNOWN.reset(token)


def model_hash(module: Module) -> str:
    """Hash of a denoiser's class, shapes and the first values of every tensor, 16 hex digits.

    The same in float32 and bfloat16, and in float16 where the weights were stored so; compiled,
    with fused projections, and with adapters that change nothing.
    Cost: a few bytes of each tensor, so it is cheap for billions of parameters.
    Raises: ``UnsupportedModel`` where the weights are not in memory (sequential offload).
    """
    for name in WRAPPERS:
        module = getattr(module, name, module)
    hashes = _KNOWN.get()
    if hashes is None:
        return _hashed(module)
    if id(module) not in hashes:
        hashes[id(module)] = _hashed(module)
    return hashes[id(module)]


def _hashed(module: Module) -> str:
    import torch

    digest = hashlib.sha256(type(module).__name__.encode())
    for name, tensor in _weights(module):
        if tensor.is_meta:
            raise UnsupportedModel(
                f"{type(module).__name__} cannot be recognised: {name} is offloaded. Use "
                "enable_model_cpu_offload instead."
            )
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        values = _first(tensor.detach()).to("cpu", torch.bfloat16)
        digest.update(values.float().numpy().tobytes())
    return digest.hexdigest()[:16]


def _first(tensor: Tensor) -> Tensor:
    """The first four values."""
    try:
        return tensor.flatten()[:4]
    except NotImplementedError:  # quantised tensors of torchao cannot be flattened
        return tensor.dequantize().flatten()[:4]


def _weights(module: Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors that make the model what it is, in the order of the names."""
    state = module.state_dict()
    adapted = _has_effect(module)
    for name in sorted(state, key=lambda name: name.replace(".base_layer.", ".")):
        if FUSED.search(name) or (ADAPTER.search(name) and not adapted):
            continue
        yield name.replace(".base_layer.", "."), state[name]


def _has_effect(module: Any) -> bool:
    """Whether any adapter changes what the model computes."""
    for layer in module.modules():
        if not hasattr(layer, "lora_B") or getattr(layer, "disable_adapters", False):
            continue
        for adapter in getattr(layer, "active_adapters", ()):
            if adapter in layer.lora_B and layer.scaling.get(adapter, 1.0) != 0.0:
                weight = getattr(layer.lora_B[adapter], "weight", None)
                if weight is None or bool(weight.detach().any()):
                    return True
    return False
