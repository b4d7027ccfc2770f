"""Videos chunk after chunk as trajectories: what a search sees of an expander."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self

import torch
from torch import Tensor

from diffalign.core.errors import UnsupportedModel
from diffalign.core.sampler import State, generator_states
from diffalign.search.video.expander import Branch, Expander, Prefix

if TYPE_CHECKING:
    from diffalign.core.budget import Meter
    from diffalign.core.words import Words


@dataclass(frozen=True, slots=True)
class Chunks:
    """Where each video of a batch stands: its next chunk, and behind it those that are made.

    Videos with a common beginning share its tensors.
    """

    branches: tuple[Branch, ...]

    def select(self, rows: Sequence[int]) -> Chunks:
        """Of those videos."""
        return Chunks(tuple(self.branches[row] for row in rows))


class Without:
    """What a sampler of images has and one of chunks has not."""

    @property
    def words(self) -> Words:
        """Unsupported."""
        self._refuse("its text has no shift")

    def std(self, step: int) -> float:
        """Unsupported."""
        self._refuse("the law of a chunk is not known")

    def redraw(self, state: State, seeds: Sequence[int]) -> State:
        """Unsupported."""
        self._refuse("a chunk cannot be drawn again without running it")

    def renoise(self, state: State, to: int, seeds: Sequence[int]) -> State:
        """Unsupported."""
        self._refuse("a video is not noised again")

    def render(self, *arguments: object, **options: object) -> Tensor:
        """Unsupported."""
        self._refuse("it has no gradient")

    def twist(self, *arguments: object) -> tuple[Tensor, Tensor]:
        """Unsupported."""
        self._refuse("it has no gradient")

    def _refuse(self, reason: str) -> NoReturn:
        raise UnsupportedModel(f"This pipeline makes a video chunk after chunk: {reason}.")


class ChunkSampler(Without):
    """A ``Sampler`` whose evaluations are the chunks of a video; children differ at each of them.

    ``State.scheduler`` holds the chunks, ``State.x0`` the frames [B, T, 3, H, W] that ``look``
    foresees. The seed of a chunk is the next number of the video's generator, so the first seed
    alone fixes all of them until ``reseed``. ``clip``: frames [F, 3, H, W] in [0, 1] that every
    video begins with; chunks are counted from its end.
    Cost: that of the expander.
    Raises: ValueError for a clip that does not end with a chunk.
    """

    branches = True
    deterministic: str | None = None
    # of start noise
    dtype = torch.float32

    def __init__(self, expander: Expander, clip: Tensor | None = None) -> None:
        self.expander, self.clip = expander, clip
        self.ends = tuple(accumulate(expander.partition))
        self.first = 0 if clip is None else self._chunks_of(clip)
        self._prefix: Prefix | None = None

    def _chunks_of(self, clip: Tensor) -> int:
        ends, frames = self.ends[:-1], len(clip)
        # a pipeline that only reads the last frames takes a clip of any length for the first chunk
        fits = frames in ends if self.expander.exact_prefix else bool(ends)
        if clip.ndim != 4 or clip.shape[1] != 3 or not fits:
            known = ", ".join(map(str, ends)) or "no length"
            raise ValueError(
                "clip must be frames [F, 3, H, W] in [0, 1] that end with a chunk, before the last "
                f"one: F one of {known} of the video's {self.ends[-1]} frames; got "
                f"{list(clip.shape)}. Cut it, or ask for a longer video: num_frames, chunks or "
                "chunk_partition, where the pipeline has it."
            )
        return ends.index(frames) + 1 if self.expander.exact_prefix else 1

    def __enter__(self) -> Self:
        self.expander.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.expander.__exit__(kind, error, trace)

    @property
    def meter(self) -> Meter:
        """What has been spent."""
        return self.expander.meter

    @property
    def count(self) -> int:
        """Chunks of a video, those of the clip left out."""
        return len(self.ends) - self.first

    @property
    def looks(self) -> range:
        """Evaluations of the first chunk after which ``look`` works."""
        first = self.expander.first_look
        return range(first, self.expander.count if self.expander.previews else first)

    def frames(self, step: int) -> int:
        """Frames of a video after so many chunks."""
        frames = self.ends[self.first + step - 1] if self.first + step else 0
        longer = 0 if self.clip is None else len(self.clip) - self.ends[self.first - 1]
        return frames + longer

    def price(self, first: int = 0, last: int | None = None) -> int:
        """Largest number of denoiser rows of one video between two chunks."""
        chunks = range(first, self.count if last is None else last)
        return sum(self.expander.price(self.first + chunk).rows for chunk in chunks)

    def look_price(self, first: int, last: int | None) -> int:
        """Denoiser rows of one video between two evaluations of its first chunk."""
        return self.expander.price(self.first, first, last).rows

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Start noise [B, C, T, h, w] of all chunks, as the seeds draw it one after another."""
        rng, pieces = generator_states(seeds), []
        for chunk in range(self.first, len(self.ends)):
            numbers, rng = _drawn(rng)
            pieces.append(torch.stack([self.expander.noise(chunk, number) for number in numbers]))
        return torch.cat(pieces, 2)

    def start(self, seeds: Sequence[int], noise: Tensor | None = None) -> State:
        """Videos before their first chunk, or right behind the clip; ``noise``: of all chunks."""
        if noise is None:
            noise = torch.empty(len(seeds), 0)
        elif noise.shape != (shape := (len(seeds), *self.noise(seeds[:1]).shape[1:])):
            raise ValueError(f"start(noise=...) must be {list(shape)}; got {list(noise.shape)}.")
        if self.clip is not None and self._prefix is None:
            self._prefix = self.expander.encode(self.clip)
        branches = tuple(Branch(self._prefix, 0, number) for number in range(len(seeds)))
        rng = generator_states(seeds)
        return State(noise, 0, self.count, rng, Chunks(branches))

    def run(self, state: State, until: int | None = None, drift: Tensor | None = None) -> State:
        """Continue until there are so many chunks, None for all."""
        last = self.count if until is None else until
        if not state.step < last <= self.count or drift is not None:
            raise ValueError(f"run(until={until}) must be in ({state.step}, {self.count}].")
        for step in range(state.step, last):
            branches, rng = _next(self, state)
            prefixes = self.expander.expand(branches)
            if not state.latents.numel():
                _check_siblings(branches, prefixes)
            chunks = Chunks(tuple(Branch(prefix, 0) for prefix in prefixes))
            state = State(state.latents, step + 1, self.count, rng, chunks)
        return state

    def look(self, state: State, evaluations: int) -> State:
        """Videos before their first chunk, run to that evaluation of it; ``x0`` then holds what
        the model predicts.

        Raises: ``UnsupportedModel`` where the pipeline does not show its predictions.
        """
        if state.step or evaluations not in self.looks:
            self._refuse(f"it cannot look ahead at evaluation {evaluations} of a first chunk")
        branches, _ = _next(self, state)
        pairs = self.expander.preview(branches, evaluations)
        chunks = Chunks(tuple(branch for branch, _ in pairs))
        return replace(state, scheduler=chunks, x0=torch.stack([frames for _, frames in pairs]))

    def preview(self, state: State) -> Tensor:
        """Frames [B, T, 3, H, W] as far as the videos are, or as ``look`` foresees them."""
        if state.x0 is not None:
            return state.x0
        prefixes = [branch.prefix for branch in _chunks(state).branches]
        return torch.stack([self.expander.decode(p) for p in prefixes if p is not None])

    def decode(self, state: State) -> Tensor:
        """Videos [B, T, 3, H, W] in [0, 1] of finished states."""
        if not state.finished:
            raise ValueError(f"decode needs finished videos; got {state.step} of {state.count}.")
        return self.preview(state)


def numbered(state: State, places: Sequence[int]) -> State:
    """Videos whose next chunk has this number among its siblings."""
    branches = zip(_chunks(state).branches, places, strict=True)
    return replace(state, scheduler=Chunks(tuple(replace(b, number=n) for b, n in branches)))


def numbers(state: State) -> list[int]:
    """Number of each video's next chunk among its siblings."""
    return [branch.number for branch in _chunks(state).branches]


def names(state: State) -> list[str]:
    """Name of each video: the numbers of its chunks among their siblings, "0.11.1"."""
    prefixes = [branch.prefix for branch in _chunks(state).branches]
    return [".".join(map(str, prefix.path)) if prefix else "" for prefix in prefixes]


def _chunks(state: State) -> Chunks:
    if not isinstance(state.scheduler, Chunks):
        raise TypeError("A state of another sampler was given; videos by chunks have their own.")
    return state.scheduler


def _next(sampler: ChunkSampler, state: State) -> tuple[list[Branch], tuple[Tensor, ...]]:
    """The next chunk of each video, by its seed or from its part of the noise that was given; the
    generators afterwards."""
    seeds, rng = _drawn(state.rng)
    branches = [replace(b, seed=seed) for b, seed in zip(_chunks(state).branches, seeds)]
    if state.latents.numel():
        first, noise = sampler.first, sampler.expander.noise
        sizes = [noise(chunk, 0).shape[1] for chunk in range(first, first + state.step + 1)]
        parts = state.latents[:, :, sum(sizes[:-1]) : sum(sizes)]
        branches = [replace(b, latents=part) for b, part in zip(branches, parts, strict=True)]
    return branches, rng


def _drawn(states: Sequence[Tensor]) -> tuple[list[int], tuple[Tensor, ...]]:
    """The next number of each generator, and the generators after it."""
    seeds, after = [], []
    for state in states:
        rng = torch.Generator()
        rng.set_state(state)
        seeds.append(int(torch.randint(2**62, (), generator=rng)))
        after.append(rng.get_state())
    return seeds, tuple(after)


def _check_siblings(branches: Sequence[Branch], prefixes: Sequence[Prefix]) -> None:
    """Raise ``UnsupportedModel`` where two seeds gave one chunk behind the same prefix."""
    pairs = pairwise(zip(branches, prefixes))
    for (branch, prefix), (other, sibling) in pairs:
        same = branch.prefix is other.prefix and branch.seed != other.seed
        if same and torch.equal(prefix.pieces[-1], sibling.pieces[-1]):
            raise UnsupportedModel(
                f"Seeds {branch.seed} and {other.seed} gave the same chunk; the pipeline draws no "
                "noise for it, so its branches would be alike."
            )
