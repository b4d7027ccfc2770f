"""What a denoiser call costs by the tokens that it computes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffalign.families.layout import TokenPlaces

if TYPE_CHECKING:
    from torch import Tensor

    from diffalign.seams.attention.sites import Layer
    from diffalign.seams.tokens.memory import Memory


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


class Account:
    """What the calls of one generation cost, beside the same calls with all ``tokens``."""

    def __init__(self, work: Work, tokens: int) -> None:
        self.work, self.tokens = work, tokens
        # steps that left tokens out, and how many of them each computed
        self.steps: set[int] = set()
        self.computed = tokens
        self.operations = self.whole = 0.0
        # of keys and values, the most that was kept at one time
        self.cache_bytes = 0

    def add(self, step: int, rows: int, index: Tensor | None, text: int) -> None:
        """A call: ``index`` [rows, S] as a passage has it, None for all tokens."""
        computed = self.tokens
        if index is not None:
            self.steps.add(step)
            self.computed = computed = index.shape[1]
        self.operations += rows * self.work(computed, self.tokens, text)
        self.whole += rows * self.work(self.tokens, self.tokens, text)

    def remembered(self, memories: Iterable[Memory]) -> None:
        """What is kept between two calls."""
        self.cache_bytes = max(self.cache_bytes, sum(memory.cache_bytes for memory in memories))

    def facts(self) -> dict[str, float]:
        """The entry of the report."""
        return {
            "steps": len(self.steps),
            "computed": self.computed,
            "tokens": self.tokens,
            "operations": self.operations,
            "operations_of_all": self.whole,
            "cache_bytes": self.cache_bytes,
        }


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
