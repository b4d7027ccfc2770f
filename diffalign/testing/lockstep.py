"""NAG written down a second time: two copies of the model walk in lock-step, one per text, each in
a thread of its own.

At every text layer they meet, the paper's equations (Chen et al. 2025, arXiv:2505.21179, eq. 7-10)
are applied to the attention outputs of the image tokens, and both go on with the result. Nothing
here knows of sequence concatenation, of masks for it, or of interception: each copy runs the
unmodified forward of diffusers with one text, so texts of unequal length need no padding.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.testing.tiny.base import Hook

Formula = Callable[[Tensor, Tensor, str], Tensor]
More = Callable[[Any, int, "Meeting"], None]


def paper(
    positive: Tensor, negative: Tensor, phi: float, tau: float, alpha: float, order: int = 1
) -> Tensor:
    """Eq. 7-10 as printed, on [..., E]."""
    extrapolated = positive + phi * (positive - negative)
    grown, size = (
        torch.linalg.vector_norm(x, order, dim=-1, keepdim=True) for x in (extrapolated, positive)
    )
    limited: Tensor = extrapolated * (grown / size).clamp(max=tau) / (grown / size)
    return alpha * limited + (1 - alpha) * positive


class Meeting:
    """Where the two walks exchange their image tokens.

    ``visits``: how often the formula was applied.
    """

    def __init__(self, formula: Formula) -> None:
        self.formula, self.barrier, self.visits = formula, threading.Barrier(2, timeout=60), 0
        self.held: list[Any] = [None, None]

    def exchange(
        self, side: int, tokens: Tensor, layer: str, formula: Formula | None = None
    ) -> Tensor:
        self.held[side] = (layer, tokens)
        self.barrier.wait()
        (first, positive), (second, negative) = self.held
        if first != second:
            raise AssertionError(f"The walks are at different layers: {first} and {second}.")
        guided = (formula or self.formula)(positive, negative, layer)
        self.visits += side == 0 and formula is None
        self.barrier.wait()
        return guided

    def share(self, side: int, tensor: Tensor, layer: str) -> Tensor:
        """The positive walk's tensor for both."""
        return self.exchange(side, tensor, layer, lambda positive, negative, layer: positive)


def share_double_blocks(twin: Any, side: int, meeting: Meeting) -> None:
    """Flux as published: the double blocks have one image stream, and the single blocks start from
    it."""
    for name, part in twin.named_modules():
        if re.fullmatch(r"transformer_blocks\.\d+\.attn\.to_[qkv]", name):
            part.register_forward_hook(
                lambda _, given, output, name=name: meeting.share(side, output, name)
            )

    def start(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {
            **kwargs,
            "hidden_states": meeting.share(side, kwargs["hidden_states"], "single blocks"),
        }

    twin.single_transformer_blocks[0].register_forward_pre_hook(start, with_kwargs=True)


def hooked(
    module: nn.Module,
    hooks: Sequence[Hook],
    side: int,
    meeting: Meeting,
    kwargs: dict[str, Any],
    more: More | None = None,
) -> nn.Module:
    """A copy of ``module`` whose text layers meet the other copy's."""
    twin = copy.deepcopy(module)
    if more is not None:
        more(twin, side, meeting)
    for name, part in twin.named_modules():
        for hook in hooks:
            if not hasattr(part, "processor") or not re.fullmatch(hook.layers, name):
                continue

            added = hook.added(part) if hook.added is not None else None

            def visit(
                tensor: Tensor, name: str = name, hook: Hook = hook, added: Any = added
            ) -> Tensor:
                if added is not None:
                    image = added()
                    moved: Tensor = meeting.exchange(side, tensor - image, name) + image
                    return moved
                where = [hook.image(tensor, kwargs, row) for row in range(len(tensor))]
                guided = meeting.exchange(
                    side, torch.stack([tensor[r, w] for r, w in enumerate(where)]), name
                )
                tensor = tensor.clone()
                for row, place in enumerate(where):
                    tensor[row, place] = guided[row]
                return tensor

            if hook.inner:
                part.get_submodule(hook.inner).register_forward_pre_hook(
                    lambda _, inputs, visit=visit: (visit(inputs[0]), *inputs[1:])
                )  # type: ignore[misc]
            else:
                part.register_forward_hook(
                    lambda _, inputs, output, visit=visit: (  # type: ignore[misc]
                        (visit(output[0]), *output[1:])
                        if isinstance(output, tuple)
                        else visit(output)
                    )
                )
    return twin


def walk(
    module: nn.Module,
    hooks: Sequence[Hook],
    positive: dict[str, Any],
    negative: dict[str, Any],
    formula: Formula,
    more: More | None = None,
) -> tuple[Any, int]:
    """The denoiser's prediction for the arguments ``positive`` under NAG away from ``negative``,
    and how many layers they met at."""
    meeting = Meeting(formula)
    results: list[Any] = [None, None]
    errors: list[BaseException] = []

    def run(side: int, kwargs: dict[str, Any]) -> None:
        try:
            with torch.no_grad():
                results[side] = hooked(module, hooks, side, meeting, kwargs, more).forward(**kwargs)
        except BaseException as error:  # the other walk must not wait for ever
            errors.append(error)
            meeting.barrier.abort()

    threads = [
        threading.Thread(target=run, args=(side, kwargs))
        for side, kwargs in enumerate((positive, negative))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    output = results[0]
    return (output[0] if isinstance(output, tuple) else output.sample), meeting.visits
