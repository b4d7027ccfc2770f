"""Rewards that a network computes: in batches that fit, on the images' device, remembered by the
image, and with gradients that outlive no batch."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from diffalign.core.errors import warn_once
from diffalign.rewards.base import BaseReward
from diffalign.rewards.checkpoint import Foreign
from diffalign.rewards.preprocessing import wide

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


class Placement(TypedDict, total=False):
    """How a network is kept: options of every reward that has one."""

    # of the network; scores are computed in fp32 at least
    dtype: Literal["fp32", "bf16", "fp16", "fp64"]
    # images at once, halved where memory ends
    batch: int
    # scores remembered by the hash of the image, 0 for none
    cache: int
    # whether the network is on the images' device during a call only
    offload: bool


class NetworkReward(BaseReward):
    """Base of rewards with a network; subclasses write ``measure``.

    The network follows the images to their device. Gradients are computed together with the score,
    batch by batch, so several rewards never hold their graphs at once; a second derivative is
    refused. Options: ``dtype`` ("fp32"), ``batch`` (8; 1 for language models), ``cache`` (256),
    ``offload`` (False).
    Raises: ValueError for a batch below 1, another dtype, and a score that is not finite.
    """

    differentiable = True

    def __init__(self, network: nn.Module, **placement: Unpack[Placement]) -> None:
        dtype = placement.get("dtype", "fp32")
        if dtype not in DTYPES:
            raise ValueError(f"{self.name}: dtype must be one of {', '.join(DTYPES)}; got {dtype}.")
        self.batch = placement.get("batch", 8)
        self.room = placement.get("cache", 256)
        if self.batch < 1 or self.room < 0:
            raise ValueError(
                f"{self.name}: batch must be at least 1 and cache at least 0; got {self.batch} and "
                f"{self.room}."
            )
        self.offload = placement.get("offload", False)
        self.network: Foreign = network.eval().requires_grad_(False).to(DTYPES[dtype])
        self._scores: OrderedDict[tuple[bytes, str], Tensor] = OrderedDict()

    @abstractmethod
    def measure(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B] scores of one batch on the network's device, in float32 at least."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the network's weights."""
        dtype: torch.dtype = next(self.network.parameters()).dtype
        return dtype

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if torch.is_grad_enabled() and images.requires_grad:
            if not self.differentiable:
                raise ValueError(
                    f"{self.name} has no gradient here; use it to choose between images."
                )
            measured: Tensor = Measured.apply(images, self, tuple(prompts))
            return self._finite(measured)
        with torch.no_grad():
            return self._finite(self._remembered(wide(images.detach()), prompts))

    def with_slopes(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Scores [B], and what each changes by with its own image [B, 3, H, W]."""

        def work(part: Tensor, texts: Sequence[str]) -> Tensor:
            leaf = part.requires_grad_()
            with torch.enable_grad():
                scores = self.measure(leaf, texts)
                (slopes,) = torch.autograd.grad(scores.sum(), leaf)
            pairs.append((scores.detach(), slopes))
            return scores

        pairs: list[tuple[Tensor, Tensor]] = []
        self._in_batches(wide(images.detach()), prompts, work)
        return torch.cat([score for score, _ in pairs]), torch.cat([slope for _, slope in pairs])

    def _remembered(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if not self.room:
            return torch.cat(self._in_batches(images, prompts, self.measure))
        texts = prompts if self.needs_prompt else [""] * len(prompts)
        keys = [(_hash(image), text) for image, text in zip(images, texts)]
        fresh = {key: i for i, key in enumerate(keys) if key not in self._scores}
        scores = {key: self._scores[key] for key in keys if key in self._scores}
        if fresh:
            rows = list(fresh.values())
            fresh_prompts = [prompts[i] for i in rows]
            parts = self._in_batches(images[rows], fresh_prompts, self.measure)
            scores |= dict(zip(fresh, torch.cat(parts).detach().cpu()))
        for key, score in scores.items():
            self._scores[key] = score
            self._scores.move_to_end(key)
        while len(self._scores) > self.room:
            self._scores.popitem(last=False)
        return torch.stack([scores[key] for key in keys]).to(images.device)

    def _in_batches(
        self,
        images: Tensor,
        prompts: Sequence[str],
        work: Callable[[Tensor, Sequence[str]], Tensor],
    ) -> list[Tensor]:
        results: list[Tensor] = []
        first = 0
        with self._resident(images.device):
            while first < len(images):
                end = min(first + self.batch, len(images))
                try:
                    results.append(work(images[first:end], prompts[first:end]))
                except torch.OutOfMemoryError:
                    if end - first == 1:
                        raise
                    self.batch = (end - first + 1) // 2
                    torch.cuda.empty_cache()
                    continue
                first = end
        return results

    @contextmanager
    def _resident(self, device: torch.device) -> Iterator[None]:
        self.network.to(device)
        try:
            yield
        finally:
            if self.offload:
                self.network.to("cpu")

    def _finite(self, scores: Tensor) -> Tensor:
        if not bool(scores.isfinite().all()):
            raise ValueError(
                f"{self.name} gave a score that is not finite: {scores.tolist()}. Are the images "
                "in [0, 1], and does the network's dtype hold its numbers?"
            )
        return scores


class Measured(torch.autograd.Function):
    """Scores [B] of images; the gradient is known when the score is."""

    @staticmethod
    def forward(
        ctx: Foreign, images: Tensor, reward: NetworkReward, prompts: Sequence[str]
    ) -> Tensor:
        scores, slopes = reward.with_slopes(images, prompts)
        ctx.save_for_backward(slopes.to(images.dtype))
        return scores

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Foreign, gradient: Tensor) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return gradient.to(slopes.dtype).view(-1, 1, 1, 1) * slopes, None, None


def _hash(image: Tensor) -> bytes:
    values = image.detach().to("cpu").contiguous()
    size = ",".join(map(str, values.shape)) + str(values.dtype)
    return hashlib.blake2b(
        values.view(torch.uint8).numpy().tobytes(), digest_size=16, key=size.encode()[:64]
    ).digest()


def warn_of_cut(owner: str, prompt: str, count: int, limit: int) -> None:
    """Say once that a prompt is longer than what the text tower reads."""
    if count > limit:
        warn_once(
            f"{owner}: the prompt {prompt[:60]!r}... has {count} tokens and its text tower reads "
            f"{limit}; the rest does not change the score."
        )
