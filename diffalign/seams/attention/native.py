"""Layers whose processor computes its attention by itself run a processor of the same meaning that
calls torch for it, while a technique acts on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from diffalign.core import UnsupportedModel
from diffalign.seams.attention.seats import xformers_ops
from diffalign.seams.attention.sites import Layer

# processor without a call that can be caught -> the one of the same meaning that has it
NATIVE = {"AttnProcessor": "AttnProcessor2_0", "SlicedAttnProcessor": "AttnProcessor2_0"}
# the same for those of xformers, where it is not installed
WITHOUT_XFORMERS = {
    "XFormersAttnProcessor": "AttnProcessor2_0",
    "XFormersJointAttnProcessor": "JointAttnProcessor2_0",
}


def to_native(layers: Sequence[Layer], stack: ExitStack) -> list[str]:
    """Switch what must be switched, undo it when ``stack`` closes, and say so: one note per kind of
    processor.

    Raises ``UnsupportedModel`` for context-parallel layers.
    """
    switched: Counter[str] = Counter()
    native = NATIVE if xformers_ops() is not None else NATIVE | WITHOUT_XFORMERS
    for layer in layers:
        processor: Any = layer.module.processor
        name = type(processor).__name__
        if getattr(processor, "_parallel_config", None) is not None:
            raise UnsupportedModel(
                f"{layer.name!r} runs in context parallel, where no layer sees the whole text; "
                "switch it off."
            )
        if name in native and not isinstance(processor, nn.Module):
            stack.callback(_replace_processor(layer.module, native[name]))
            switched[name] += 1
    return [
        f"{what} gives way to native attention at {count} layers while the techniques act"
        for what, count in switched.items()
    ]


def _replace_processor(module: Any, name: str) -> Any:
    from diffusers.models import attention_processor

    before = module.processor
    module.processor = native = getattr(attention_processor, name)()

    def undo() -> None:
        if module.processor is native:  # somebody who has set another one since wants to keep it
            module.processor = before

    return undo
