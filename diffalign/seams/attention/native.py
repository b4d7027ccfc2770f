"""Layers whose processor does not call ``scaled_dot_product_attention`` run on the native backend
while a technique acts on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from diffalign.core import UnsupportedModel
from diffalign.seams.attention.sites import Layer

# processor without such a call -> the one of the same meaning that has it
NATIVE = {
    "AttnProcessor": "AttnProcessor2_0",
    "SlicedAttnProcessor": "AttnProcessor2_0",
    "XFormersAttnProcessor": "AttnProcessor2_0",
    "XFormersJointAttnProcessor": "JointAttnProcessor2_0",
}


def to_native(layers: Sequence[Layer], stack: ExitStack) -> list[str]:
    """Switch what must be switched, undo it when ``stack`` closes, and say so: one note per kind of
    switch.

    Raises ``UnsupportedModel`` for context-parallel layers.
    """
    switched: Counter[str] = Counter()
    for layer in layers:
        processor: Any = layer.module.processor
        name = type(processor).__name__
        if getattr(processor, "_parallel_config", None) is not None:
            raise UnsupportedModel(
                f"{layer.name!r} runs in context parallel, where no layer sees the whole text; "
                "switch it off."
            )
        if name in NATIVE and not isinstance(processor, nn.Module):
            stack.callback(_replace_processor(layer.module, NATIVE[name]))
            switched[name] += 1
        elif hasattr(processor, "_attention_backend"):
            backend = _backend(processor)
            if backend != "native":
                stack.callback(_replace_backend(processor))
                switched[f"attention backend {backend!r}"] += 1
    return [
        f"{what} gives way to native attention at {count} layers while the techniques act"
        for what, count in switched.items()
    ]


def _backend(processor: Any) -> str:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    active = processor._attention_backend
    if active is None:
        active = _AttentionBackendRegistry.get_active_backend()[0]
    return str(getattr(active, "value", active))


def _replace_backend(processor: Any) -> Any:
    from diffusers.models.attention_dispatch import AttentionBackendName

    set_on_object = "_attention_backend" in vars(processor)
    before, processor._attention_backend = processor._attention_backend, AttentionBackendName.NATIVE

    def undo() -> None:
        if set_on_object:
            processor._attention_backend = before
        else:
            del processor._attention_backend

    return undo


def _replace_processor(module: Any, name: str) -> Any:
    from diffusers.models import attention_processor

    before = module.processor
    module.processor = native = getattr(attention_processor, name)()

    def undo() -> None:
        if module.processor is native:  # somebody who has set another one since wants to keep it
            module.processor = before

    return undo
