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
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Formula = Callable[[Tensor, Tensor, str], Tensor]
More = Callable[[Any, int, "Meeting"], None]
Hook = tuple[str, str, str]

# family -> [(layers, module whose input is hooked ("" for the layer's own output), where its image
# tokens are)]
CROSS: list[Hook] = [(r".*attn2", "to_out.0", "all")]
FLUX: list[Hook] = [
    (r"transformer_blocks\.\d+\.attn", "to_out.0", "all"),
    (r"single_transformer_blocks\.\d+\.attn", "", "behind text"),
]
HOOKS: dict[str, list[Hook]] = {
    **dict.fromkeys(("sd", "sdxl", "kolors", "pixart", "sana", "ltx", "wan", "cosmos2"), CROSS),
    "sd3": [(r"transformer_blocks\.\d+\.attn", "to_out.0", "all")],
    "flux": FLUX,
    "chroma": FLUX,
    "qwen": [(r"transformer_blocks\.\d+\.attn", "to_out.0", "all")],
    "cogvideox": [(r"transformer_blocks\.\d+\.attn1", "to_out.0", "behind text")],
    "lumina2": [(r"layers\.\d+\.attn", "to_out.0", "behind masked text")],
    "z-image": [(r"layers\.\d+\.attention", "to_out.0", "before text")],
}


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


def _span(what: str, tensor: Tensor, kwargs: dict[str, Any], row: int) -> slice:
    """Where the image tokens are in one row of a hooked tensor [B, S, E]."""
    if what == "all":
        return slice(0, tensor.shape[1])
    if what == "behind text":
        return slice(kwargs["encoder_hidden_states"].shape[1], tensor.shape[1])
    if what == "behind masked text":
        image = kwargs["hidden_states"].shape[-1] * kwargs["hidden_states"].shape[-2] // 4
        start = int(kwargs["encoder_attention_mask"][row].sum())
        return slice(start, start + image)
    latent = kwargs["x"][row]
    return slice(0, -(-latent.shape[-1] * latent.shape[-2] // 4 // 32) * 32)


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


def _image_keys(part: Any) -> Callable[[], Tensor]:
    """Wan image-to-video adds attention over image keys to the same output: what it adds in the
    running call."""
    held: dict[str, Tensor] = {}
    for name in ("norm_q", "norm_added_k", "add_v_proj"):
        getattr(part, name).register_forward_hook(
            lambda _, given, output, name=name: held.update({name: output})
        )

    def added() -> Tensor:
        q, k, v = (
            held[name].reshape(*held[name].shape[:2], part.heads, -1).transpose(1, 2)
            for name in ("norm_q", "norm_added_k", "add_v_proj")
        )
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        image: Tensor = (weights @ v).transpose(1, 2).flatten(2)
        return image

    return added


def hooked(
    module: nn.Module,
    family: str,
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
        for pattern, inner, what in HOOKS[family]:
            if not hasattr(part, "processor") or not re.fullmatch(pattern, name):
                continue

            added = _image_keys(part) if family == "wan" and part.add_k_proj is not None else None

            def visit(
                tensor: Tensor, name: str = name, what: str = what, added: Any = added
            ) -> Tensor:
                if added is not None:
                    image = added()
                    moved: Tensor = meeting.exchange(side, tensor - image, name) + image
                    return moved
                where = [_span(what, tensor, kwargs, row) for row in range(len(tensor))]
                guided = meeting.exchange(
                    side, torch.stack([tensor[r, w] for r, w in enumerate(where)]), name
                )
                tensor = tensor.clone()
                for row, place in enumerate(where):
                    tensor[row, place] = guided[row]
                return tensor

            if inner:
                part.get_submodule(inner).register_forward_pre_hook(
                    lambda _, given, visit=visit: (visit(given[0]), *given[1:])
                )  # type: ignore[misc]
            else:
                part.register_forward_hook(lambda _, given, output, visit=visit: visit(output))  # type: ignore[misc]
    return twin


def walk(
    module: nn.Module,
    family: str,
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
                results[side] = hooked(module, family, side, meeting, kwargs, more).forward(
                    **kwargs
                )
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
