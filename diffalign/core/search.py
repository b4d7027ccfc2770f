"""A method: it spends many runs of one pipeline on a better image.

``da.align`` gives it a ``Problem`` and calls ``step`` until the budget is used up, the user stops
it or it is finished. Whatever was finished and scored by then is the result, so a method never
handles budgets, interrupts, batches, folders or files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, Self, TypeVar

from diffalign.core.option import check_options

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffalign.core.budget import Meter
    from diffalign.core.reward import Reward
    from diffalign.core.sampler import Clamp, Mode, Sampler, State
    from diffalign.core.technique import Technique
    from diffalign.core.words import Shift

S = TypeVar("S")

Stage = Literal["first", "middle", "last"]
"""Part of a video: what is there at first, what happens, how it ends."""


ByChunks = Literal["never", "can", "wants", "needs"]
"""Whether a method acts on videos that are made chunk after chunk."""


@dataclass(frozen=True, slots=True)
class Move:
    """A random choice of one image, made when its trajectory has come to evaluation ``step``.

    ``State.reseed`` with ``seed`` repeats it; at step 0 it draws the start noise too. Of a video
    that is made chunk after chunk, ``step`` counts chunks.
    """

    step: int
    seed: int
    # the evaluation to which noise takes the image back, None where it goes on from ``step``
    back: int | None = None


@dataclass(frozen=True, slots=True)
class Lineage:
    """How one image came about; with the settings of the run it can be made again."""

    moves: tuple[Move, ...]
    # [...] start noise of this image where its first seed does not draw it
    noise: Tensor | None = None
    # what the pipeline was given instead of the problem's prompt
    prompt: str | None = None
    # what was added to the embeddings of the text's tokens
    shift: Shift | None = None
    # whether it is a video made chunk after chunk, each by a seed that follows from the first
    chunks: bool = False
    # (evaluation, drift [...] on the CPU that was added to the mean of its step), in their order
    drifts: tuple[tuple[int, Tensor], ...] = ()

    def then(self, step: int, seed: int, back: int | None = None) -> Lineage:
        """The lineage with one more random choice."""
        return replace(self, moves=(*self.moves, Move(step, seed, back)))

    def drifted(self, step: int, drift: Tensor) -> Lineage:
        """The lineage with one more step that ``drift`` [...] led elsewhere."""
        return replace(self, drifts=(*self.drifts, (step, drift.detach().to("cpu", copy=True))))

    @property
    def seed(self) -> int | None:
        """The seed that alone makes the image in a plain call, None where there is none."""
        single = len(self.moves) == 1 and self.noise is None and self.shift is None
        return self.moves[0].seed if single and not self.chunks and not self.drifts else None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A finished and scored image."""

    # by the reward that is optimised
    score: float
    # [3, H, W] in [0, 1], of a video [T, 3, H, W]; float32 on the CPU
    image: Tensor
    lineage: Lineage
    # by the rewards that settle ties, in their order; empty until a tie asks for them
    others: tuple[float, ...] = ()
    # of each part of the reward, where the method asked for them
    parts: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Ascent:
    """Scores of start noises and where they rise, for each of a reward's R parts."""

    # [B], float64 on the CPU, of the whole reward; not finite where the reward is not
    scores: Tensor
    # [R, B], float64 on the CPU, of each part
    values: Tensor
    # of each part in the whole
    weights: tuple[float, ...]
    # [R, B, ...] float32, of each part in the start noise, its weight left out
    gradients: Tensor
    # [R, B]: norm of the gradient in the noise over that in the image, NaN where that is zero
    gains: Tensor
    # the finished images whose scores are finite
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Marks:
    """What a reward says of videos that are not finished, for each of its R parts."""

    # of each part in the whole
    weights: tuple[float, ...]
    # [R, B], float64 on the CPU
    scores: Tensor
    # [B, 3, H, W] in [0, 1], the last frame of each video
    frames: Tensor

    @property
    def sums(self) -> Tensor:
        """Weighted sums [B] of the parts' scores."""
        return self.scores.new_tensor(self.weights) @ self.scores


@dataclass(frozen=True, slots=True)
class Least:
    """What the smallest result of a method takes, the final call left out."""

    # denoiser rows
    rows: int
    decodes: int = 1
    scores: int = 1
    # backward passes, in rows
    backward: int = 0

    def __add__(self, other: Least) -> Least:
        return Least(
            self.rows + other.rows,
            self.decodes + other.decodes,
            self.scores + other.scores,
            self.backward + other.backward,
        )


@dataclass(frozen=True, slots=True)
class Info:
    """What a step of a method did, for the progress line and the history."""

    text: str = ""
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Node:
    """A state of a tree search, for drawing and for reports."""

    # index of the parent among the nodes, None for the root
    parent: int | None
    # evaluations made; 0 is noise
    step: int
    value: float
    visits: int
    # index into the images of the tree, None for a state that others continue
    image: int | None = None
    # unique within the tree, "" where nodes have no names
    name: str = ""


@dataclass(frozen=True, slots=True)
class Tree:
    """What a tree search has visited; parents stand before their children."""

    nodes: tuple[Node, ...]
    # [3, H, W] each
    images: tuple[Tensor, ...]
    # nodes from the root to the result
    best: tuple[int, ...] = ()
    # what a step is
    unit: str = "evaluations"


class Problem(Protocol):
    """One prompt, one pipeline and one reward, as a method sees them.

    Everything that costs goes through it: it splits work into batches that fit, counts before the
    work is done, checks scores, and keeps the best image. The order of calls decides every seed,
    so equal calls give equal results.
    """

    prompt: str

    @property
    def sampler(self) -> Sampler:
        """Trajectories of the pipeline: number of evaluations, whether they can branch, prices."""
        ...

    @property
    def reward(self) -> Reward:
        """What is optimised; score through ``score``, which counts and checks."""
        ...

    @property
    def meter(self) -> Meter:
        """What has been spent."""
        ...

    @property
    def rng(self) -> torch.Generator:
        """For the method's own random choices; its state is saved with the run."""
        ...

    @property
    def processes(self) -> int:
        """How many processes work on the same run, each with its own seeds."""
        ...

    @property
    def best(self) -> Candidate | None:
        """The best finished image so far, None before the first."""
        ...

    def seeds(self, count: int) -> list[int]:
        """Fresh seeds: those of images 0, 1, 2, ... of the prompt by the one seed rule, of
        several processes each its own ones."""
        ...

    def room(self, count: int, first: int = 0, last: int | None = None, scores: int = 1) -> int:
        """How many of ``count`` images the budget lets run between two evaluations (None: the end),
        each decoded and scored ``scores`` times; the final call is kept back.

        Raises: ``BudgetExceeded`` where not even one fits.
        """
        ...

    def start(self, seeds: Sequence[int], noise: Tensor | None = None) -> State:
        """States before the first step, of noise that the seeds draw or that is given [B, ...]."""
        ...

    def run(self, state: State, until: int | None = None, drift: Tensor | None = None) -> State:
        """Continue to evaluation ``until``, None for the end; any number of images.

        ``drift`` [B, ...] is added to the mean of the first step.
        """
        ...

    def twist(self, state: State) -> tuple[Tensor, Tensor]:
        """Scores [B], float64, of the images that the next evaluation would predict, and their
        gradient [B, ...] in the latents; one more evaluation, forward and backward."""
        ...

    def decode(self, state: State) -> Tensor:
        """The images [B, 3, H, W] of finished states, neither scored nor remembered."""
        ...

    def preview(self, state: State) -> Tensor:
        """Scores [B], float64, of the images that the last evaluation predicts (``State.x0``)."""
        ...

    def look(self, state: State, evaluations: int) -> State:
        """Videos before their first chunk, run to that evaluation of it: ``marks`` then sees what
        the model predicts there, and ``run`` goes on from there where the pipeline can.

        Raises: ``UnsupportedModel`` where the sampler cannot look ahead.
        """
        ...

    def marks(self, state: State, prompt: str, stage: Stage | None = None) -> Marks:
        """Scores of each part of the reward for videos as far as they are, against that text.

        ``stage``: which frames matter to rewards that look at some only, None for all. A part that
        needs more frames than there are gets weight 0. The videos are not remembered.
        """
        ...

    def finish(
        self, state: State, lineages: Sequence[Lineage], *, parts: bool = False
    ) -> list[Candidate]:
        """Decode and score finished states; the best is remembered. ``parts``: the candidates hold
        the score of each part of the reward too."""
        ...

    def score(self, images: Tensor) -> Tensor:
        """Scores [B], float64 on the CPU, of images [B, 3, H, W]; checked for shape and NaN."""
        ...

    def ascend(
        self,
        noise: Tensor,
        seeds: Sequence[int],
        *,
        parts: bool = False,
        mode: Mode = "checkpoint",
        clamp: Clamp = "hard",
    ) -> Ascent:
        """Images of start noise [B, ...] with their scores and gradients, by one differentiable
        run; the images are finished ones and remembered.

        ``seeds``: of later noise. ``parts``: one gradient for each part of a weighted reward, its
        weight left out. ``mode``, ``clamp``: see ``Sampler.render``.
        """
        ...

    def lean(
        self,
        noise: Tensor,
        seeds: Sequence[int],
        shift: Shift,
        *,
        mode: Mode = "checkpoint",
        clamp: Clamp = "hard",
    ) -> tuple[Tensor, Tensor]:
        """Scores [B], float64, of images of start noise [B, ...] whose text has this shift, and the
        gradient [tokens, D] of their sum in ``shift.values``; the images are not remembered."""
        ...

    def variant(
        self,
        techniques: Sequence[Technique] | None = None,
        call: Mapping[str, Any] | None = None,
        prompt: str | None = None,
        cache: float | None = None,
        shift: Shift | None = None,
    ) -> Self:
        """The same problem with other techniques, other arguments of the pipeline (merged into
        those of the run), another text for the pipeline, something added to the embeddings of its
        tokens, or the first-block cache of diffusers at this threshold; budget, seeds and reward
        are shared, images are scored against the problem's own prompt. What a variant finishes is a
        draft, which is never the best; only that of a variant with nothing but another text or
        other embeddings is remembered like any other."""
        ...


@dataclass(frozen=True)
class Method(ABC, Generic[S]):
    """A search or a noise optimiser: a frozen dataclass whose fields are ``option()``.

    ``S`` is plain data (dataclasses of ours, tensors, numbers, text, lists, tuples, mappings): it
    is saved after every step, and a run that was killed continues from it.
    """

    # whether it needs children of one state that differ, so a stochastic kernel
    branches: ClassVar[bool] = False
    # whether it needs a reward with gradient
    needs_gradient: ClassVar[bool] = False
    # whether each image follows from its first seed, and start noise, alone
    seed_level: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self)
        self.check()

    @property
    def chunks(self) -> ByChunks:
        """Whether it acts on videos that are made chunk after chunk, where an evaluation of the
        sampler is a chunk: where the pipeline has no other way ("can"), wherever the pipeline does
        ("wants"), or nowhere else ("needs")."""
        return "never"

    def check(self) -> None:
        """Raise ValueError where options contradict each other; each alone is right already."""

    def refuses(self, problem: Problem) -> str | None:
        """Why it cannot act on this problem, None when it can; asked before any compute."""
        return None

    def least(self, problem: Problem) -> Least:
        """What its smallest result takes; a budget of less is refused before any compute."""
        return Least(problem.sampler.price())

    def repeat_price(self, problem: Problem) -> int:
        """Largest number of denoiser rows that making one of its images again takes."""
        return problem.sampler.price()

    @abstractmethod
    def init(self, problem: Problem) -> S:
        """The state before the first step; nothing is run yet."""

    @abstractmethod
    def step(self, problem: Problem, state: S) -> tuple[S, Info]:
        """One round. ``state`` is not changed: a step that the budget ends is as if not begun,
        but for the images that it finished."""

    @property
    def ends(self) -> bool:
        """Whether it finishes by itself; one that does not needs a budget."""
        return False

    @property
    def total(self) -> int | None:
        """How many images it finishes by itself; None where it does not say."""
        return None

    def finished(self, state: S) -> bool:
        """Whether there is nothing left to do."""
        return False

    def best(self, problem: Problem, state: S) -> Candidate | None:
        """The result so far."""
        return problem.best

    def findings(self, state: S) -> dict[str, Tensor]:
        """Tensors by name that it has found besides images, such as a law of start noise."""
        return {}

    def tree(self, state: S) -> Tree | None:
        """The states that it has visited, None for a method without a tree."""
        return None
