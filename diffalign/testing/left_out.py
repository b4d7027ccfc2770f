"""Runs in which image tokens are left out, and slow ways of saying what they must be."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from diffalign.core import StepInfo, TokenTechnique
from diffalign.core.types import Keywords, Pipeline

SDPA = F.scaled_dot_product_attention


@dataclass(frozen=True, slots=True)
class Images:
    """Which images a run has, and their number of tokens once that is known."""

    numbers: tuple[int, ...]
    tokens: int = 0

    def select(self, rows: Sequence[int]) -> Images:
        """Those images, in that order."""
        return replace(self, numbers=tuple(self.numbers[row] for row in rows))


@dataclass(frozen=True, slots=True)
class RandomSets(TokenTechnique[Images]):
    """Computes a random set of tokens, another one for each image and step."""

    share: float = 0.4
    start: int = 2

    def init(self, batch: int) -> Images:
        return Images(tuple(range(batch)))

    def remembers(self, step: StepInfo) -> bool:
        return self.start - 1 <= step.index < step.count - 1

    def choose(self, step: StepInfo, state: Images) -> Tensor | None:
        if step.index < self.start or not state.tokens:
            return None
        sets = [self.of(step.index, number, state.tokens) for number in state.numbers]
        return torch.stack(sets)

    def of(self, step: int, image: int, tokens: int) -> Tensor:
        """The tokens of one image at one step."""
        rng = torch.Generator().manual_seed(1000 * step + image)
        count = max(1, int(self.share * tokens))
        return torch.randperm(tokens, generator=rng)[:count].sort().values

    def observe(
        self,
        prediction: Tensor,
        computed: Tensor | None,
        grid: tuple[int, int, int],
        step: StepInfo,
        state: Images,
    ) -> Images:
        return replace(state, tokens=prediction.shape[1])


class CachedKeys(TorchFunctionMode):
    """The cached variant at full length: every token goes through every layer, and where one is not
    computed its keys and values are those of the step that computed it last.

    ``tokens``: image tokens of a row; ``text_first``: where the text stands in joint attention.
    """

    def __init__(self, tokens: int, text_first: bool) -> None:
        super().__init__()
        self.tokens, self.text_first = tokens, text_first
        # (branch, number of the call, "key" or "value") -> of all image tokens
        self.caches: dict[tuple[int, int, str], Tensor] = {}
        self.computed: Tensor | None = None
        self.branch = self.call = 0

    def begin(self, branch: int, computed: Tensor | None) -> None:
        """A call of the model begins: of which branch, and which tokens [rows, S] it computes."""
        self.branch, self.computed, self.call = branch, computed, 0

    def __torch_function__(
        self, func: object, types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        assert callable(func)
        options = dict(kwargs) if isinstance(kwargs, dict) else {}
        if func is not SDPA:
            return func(*args, **options)
        call: Keywords = {**dict(zip(("query", "key", "value"), args)), **options}
        length = call["key"].shape[2]
        if call["query"].shape[2] == length:  # not the text alone
            first = length - self.tokens if self.text_first else 0
            for name in ("key", "value"):
                call[name] = self._mixed(name, call[name], slice(first, first + self.tokens))
            self.call += 1
        return func(**call)

    def _mixed(self, name: str, x: Tensor, image: slice) -> Tensor:
        x, place = x.clone(), (self.branch, self.call, name)
        if self.computed is not None:
            mask = torch.zeros(len(x), self.tokens, dtype=torch.bool)
            mask = mask.scatter(1, self.computed, True)[:, None, :, None]
            x[:, :, image] = x[:, :, image].where(mask, self.caches[place])
        self.caches[place] = x[:, :, image].clone()
        return x


@contextmanager
def noted(model: torch.nn.Module) -> Iterator[list[tuple[Keywords, Tensor]]]:
    """The calls of a model in the block: arguments, and prediction [rows, ...]."""
    calls: list[tuple[Keywords, Tensor]] = []

    def hook(module: object, args: object, kwargs: Keywords, output: Sequence[Tensor]) -> None:
        calls.append((dict(kwargs), output[0].clone()))

    handle = model.register_forward_hook(hook, with_kwargs=True)  # type: ignore[arg-type]
    try:
        yield calls
    finally:
        handle.remove()


def in_tokens(prediction: Tensor, patch: int) -> Tensor:
    """A prediction [rows, N, p], or [rows, C, H, W] in patches, as tokens [rows, N, p]."""
    if prediction.ndim == 3:
        return prediction
    rows, channels = prediction.shape[:2]
    height, width = (size // patch for size in prediction.shape[2:])
    patches = prediction.reshape(rows, channels, height, patch, width, patch)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(rows, height * width, -1)


@contextmanager
def still(pipe: Pipeline) -> Iterator[list[Tensor]]:
    """Within the block a step changes neither the latents nor the time, so that every prediction of
    a run is the same: those that reach the scheduler."""
    scheduler, predictions = pipe.scheduler, []
    set_timesteps, step = scheduler.set_timesteps, scheduler.step

    @functools.wraps(set_timesteps)
    def at_one_time(*args: object, **kwargs: object) -> None:
        set_timesteps(*args, **kwargs)
        scheduler.timesteps[:] = scheduler.timesteps[1].clone()

    @functools.wraps(step)
    def stay(model_output: Tensor, timestep: object, sample: Tensor, **rest: object) -> object:
        predictions.append(model_output.clone())
        return (sample,)

    scheduler.set_timesteps, scheduler.step = at_one_time, stay
    try:
        yield predictions
    finally:
        del scheduler.set_timesteps, scheduler.step
