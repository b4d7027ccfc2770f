"""Videos in microseconds: frames are numbers of an autoregressive Gaussian, one in each chunk.

``Law`` is the model: ``f_k = carry f_(k-1) + spread z``, a frame is the grey of its number.
``search_chain`` runs a method on it through everything that ``align`` has behind its checks of a
pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Self

import torch
from torch import Tensor

from diffalign.alignment.door import search
from diffalign.alignment.driver import Status
from diffalign.alignment.order import Order, method_of
from diffalign.alignment.result import Result
from diffalign.alignment.setting import AnySampler, Setting
from diffalign.core import Budget, Meter, Method, Reward
from diffalign.search.video.expander import Branch, Prefix, Price
from diffalign.search.video.sampler import ChunkSampler

# numbers in [-SPAN, SPAN] are greys in [0, 1]
SPAN = 16.0


def numbers_of(videos: Tensor) -> Tensor:
    """The numbers [B, T], float64, that videos [B, T, 3, 1, 1] show."""
    return (videos[:, :, 0, 0, 0].double() - 0.5) * (2 * SPAN)


@dataclass(frozen=True)
class Law:
    """An autoregressive Gaussian, and what has been drawn from it."""

    carry: float = 0.9
    spread: float = 1.0
    chunks: int = 4
    # evaluations of a chunk; fewer add an error of ``error / evaluations``
    evaluations: int = 4
    error: float = 0.0
    # whether chunks show what they will be
    previews: bool = True
    # chunk of every frame that was made, in order
    made: list[int] = field(default_factory=list)

    def frame(self, before: float, noise: float, evaluations: int) -> float:
        """The number behind ``before``."""
        return self.carry * before + self.spread * noise + self.error / evaluations


class ChainExpander:
    """The expander of a law; an evaluation is a row."""

    exact_prefix = True
    first_look = 1

    def __init__(self, law: Law, meter: Meter, evaluations: int) -> None:
        self.law, self.meter, self.count = law, meter, evaluations
        self.partition = (1,) * law.chunks
        self.previews = law.previews

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def noise(self, chunk: int, seed: int) -> Tensor:
        """The z of a chunk, [1, 1, 1, 1]."""
        rng = torch.Generator().manual_seed(seed)
        return torch.randn((), generator=rng, dtype=torch.float64).view(1, 1, 1, 1)

    def price(self, chunk: int, first: int = 0, last: int | None = None) -> Price:
        """A row for each evaluation."""
        rows = len(range(self.count)[first:last])
        return Price(rows, float(rows))

    def expand(self, branches: Sequence[Branch]) -> list[Prefix]:
        """Each video with one more number."""
        steps = self.count - branches[0].step
        self.meter.charge(rows=len(branches) * steps)
        self.meter.note(evaluations=len(branches) * steps)
        self.law.made.extend(branch.chunk for branch in branches)
        return [self._grown(branch) for branch in branches]

    def _grown(self, branch: Branch) -> Prefix:
        before = branch.prefix or Prefix((), (), ())
        piece = torch.tensor([self._number(branch)], dtype=torch.float64)
        return Prefix(
            (*before.pieces, piece), (*before.path, branch.number), (*before.seeds, branch.seed)
        )

    def _number(self, branch: Branch) -> float:
        last = float(branch.prefix.pieces[-1]) if branch.prefix else 0.0
        noise = self.noise(branch.chunk, branch.seed) if branch.latents is None else branch.latents
        return self.law.frame(last, float(noise), self.count)

    def preview(self, branches: Sequence[Branch], step: int) -> list[tuple[Branch, Tensor]]:
        """The number as it will be, drawn towards zero by what is left of the evaluations."""
        self.meter.charge(rows=len(branches) * (step - branches[0].step), decodes=len(branches))
        pairs = []
        for branch in branches:
            number = self._number(branch) * step / self.count
            video = torch.tensor([number], dtype=torch.float64)
            pairs.append((replace(branch, step=step), _frames(video)))
        return pairs

    def decode(self, prefix: Prefix, frames: Sequence[int] | None = None) -> Tensor:
        """Greys [F, 3, 1, 1]."""
        self.meter.charge(decodes=1)
        video = _frames(torch.cat(prefix.pieces))
        return video if frames is None else video[list(frames)]

    def encode(self, clip: Tensor) -> Prefix:
        """The numbers that a clip shows."""
        numbers = numbers_of(clip[None])[0]
        return Prefix(tuple(numbers[:, None]), (0,) * len(clip), (None,) * len(clip))


def _frames(numbers: Tensor) -> Tensor:
    return (0.5 + numbers / (2 * SPAN))[:, None, None, None].expand(-1, 3, 1, 1)


@dataclass(frozen=True)
class ChainSetting(Setting):
    """How a law is called."""

    law: Law = field(default_factory=Law)

    def sampler(self, meter: Meter) -> AnySampler:
        """Its chunks."""
        evaluations = int(self.call.get("num_inference_steps", self.law.evaluations))
        return ChunkSampler(ChainExpander(self.law, meter, evaluations), self.clip)


@dataclass(frozen=True)
class ChainOrder(Order):
    """An order for videos of a law."""

    law: Law = field(default_factory=Law)

    def setting(self, prompt: str) -> Setting:
        """Its call."""
        return ChainSetting(
            self.pipe, prompt, call=self.arguments, chunked=True, clip=self.clip, law=self.law
        )

    @property
    def frames(self) -> int | None:
        """One frame for each chunk."""
        return self.law.chunks


def search_chain(
    method: Method[object] | str,
    reward: Reward,
    law: Law,
    *,
    prompt: str = "a chain",
    budget: Budget | None = None,
    batch: int = 4,
    clip: Tensor | None = None,
    seed: int = 0,
    folder: Path | None = None,
    show: Callable[[Status], None] | None = None,
) -> Result:
    """What ``align`` gives for videos of a law. ``reward``: of videos [B, T, 3, 1, 1]."""
    order = ChainOrder(
        pipe=SimpleNamespace(scheduler=None),
        method=method_of(method),
        reward=reward,
        budget=budget,
        techniques=(),
        judges=(),
        ties=(),
        kernel=None,
        batch=batch,
        seed=seed,
        call={} if clip is None else {"clip": clip},
        show=show,
        law=law,
    )
    return search(order, prompt, folder)
