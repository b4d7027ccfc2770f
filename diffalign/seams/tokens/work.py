"""What a denoiser call costs by the tokens that it computes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffalign.families.layout import TokenPlaces

if TYPE_CHECKING:
    from diffalign.seams.attention.sites import Layer


@dataclass(frozen=True, slots=True)
class Work:
    """Floating point operations of one model: its linear layers and its attention."""

    # weights of the linear layers that treat image tokens, and those that treat text tokens
    image: int
    text: int
    # width of all layers of a kind together
    joint: int
    alone: int
    cross: int

    def __call__(self, computed: int, tokens: int, text: int) -> float:
        """Of one row, with ``computed`` S of ``tokens`` N image tokens and ``text`` L text tokens.

        ``2 (W_image S + W_text L)`` in linear layers; attention ``4 C (S + L) (N + L)`` where text
        and image are in one softmax, ``4 C S N`` of the image alone, ``4 C S L`` to the text.
        """
        linear = 2.0 * (self.image * computed + self.text * text)
        joint = 4.0 * self.joint * (computed + text) * (tokens + text)
        return linear + joint + 4.0 * computed * (self.alone * tokens + self.cross * text)


def work_of(places: TokenPlaces, model: Any, layers: Iterable[Layer]) -> Work:
    """The operations of a model with these attention layers."""
    widths = dict.fromkeys(("joint", "self", "cross"), 0)
    for layer in layers:
        widths[layer.kind] += int(layer.module.inner_dim)  # type: ignore[arg-type]
    both = _weights(model, places.both)
    image, text = (_weights(model, pattern) + both for pattern in (places.image, places.text))
    return Work(image, text, widths["joint"], widths["self"], widths["cross"])


def _weights(model: Any, pattern: str) -> int:
    """Weights of the linear layers whose names fit; the parts of a LoRA count too."""
    return sum(
        int(module.in_features) * int(module.out_features)
        for name, module in model.named_modules()
        if re.fullmatch(pattern, name) and hasattr(module, "in_features") and not _wraps(module)
    )


def _wraps(module: Any) -> bool:
    return next(module.children(), None) is not None
