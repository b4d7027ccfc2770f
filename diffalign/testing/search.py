"""A whole search problem in microseconds: images are points, the denoiser is a formula.

``toy`` makes a ``Problem`` whose pipeline is a ``Chain`` on a ``Mixture``: latents are points
[B, D], an image is the point itself as pixels [3, 1, D]. Everything of the contract is there:
batches, budgets, seeds, states that can be selected and joined, previews, gradients. All rows have
random numbers of their own, so a batch is bit for bit its rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from diffalign.alignment.ascent import Slopes, parts_of
from diffalign.core import (
    Ascent,
    BudgetExceeded,
    Candidate,
    Info,
    Lineage,
    Marks,
    Meter,
    Method,
    Move,
    Reward,
    Stage,
    State,
    Technique,
    UnsupportedModel,
)
from diffalign.core.sampler import Clamp, Mode, Transition
from diffalign.core.seeds import seed_of
from diffalign.core.words import Shift, Words
from diffalign.testing.mixtures import Chain, Denoiser, Function

S = TypeVar("S")
# points in [-SPAN, SPAN] are pixels in [0, 1]
SPAN = 16.0
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def pixels(points: Tensor) -> Tensor:
    """Points [B, D] as images [B, 3, 1, D]."""
    return (0.5 + points / (2 * SPAN))[:, None, None].expand(-1, 3, 1, -1)


def points_of(images: Tensor) -> Tensor:
    """The points [B, D] that images show."""
    return (images[:, 0, 0] - 0.5) * (2 * SPAN)


@dataclass(slots=True)
class PointReward:
    """A reward of images that is a function of the points they show."""

    function: Function
    differentiable: bool = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.function(points_of(images))


@dataclass(slots=True)
class PointSum:
    """A weighted sum of such rewards."""

    parts: Sequence[tuple[float, Reward]]
    differentiable: bool = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        rows = [weight * part(images, prompts) for weight, part in self.parts]
        return torch.stack(rows).sum(0)


class PointSampler:
    """The chain of a model as a ``Sampler``; a row of it costs one NFE an evaluation."""

    def __init__(self, model: Denoiser, chain: Chain, meter: Meter) -> None:
        self.model, self.chain, self.meter = model, chain, meter

    @property
    def count(self) -> int:
        """Evaluations of a trajectory."""
        return self.chain.count

    @property
    def branches(self) -> bool:
        """Whether children of one state can differ."""
        return self.chain.eta > 0.0

    @property
    def deterministic(self) -> str | None:
        """Why children of one state are alike, None where they differ."""
        return None if self.branches else "The chain draws no noise; give it eta above 0."

    @property
    def words(self) -> Words:
        """A chain has no text encoder."""
        raise UnsupportedModel("A chain of points has no text encoder.")

    def price(self, first: int = 0, last: int | None = None) -> int:
        """Denoiser rows of one image between two evaluations."""
        return (self.count if last is None else last) - first

    def std(self, step: int) -> float:
        """Standard deviation of the noise of an evaluation."""
        return self.chain.std(step)

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """The start noise that the seeds draw."""
        return self.start(seeds).latents

    def start(self, seeds: Sequence[int], noise: Tensor | None = None) -> State:
        """States before the first evaluation; noise is drawn by the seeds where none is given."""
        keys, drawn = _normals(_mix(np.array(seeds, dtype=np.uint64)), self.model.size)
        return State(drawn if noise is None else noise, 0, self.count, _rng(keys))

    def run(self, state: State, until: int | None = None, drift: Tensor | None = None) -> State:
        """Continue to evaluation ``until``. ``drift`` [B, D] is added to the mean of the next."""
        last = self.count if until is None else until
        if not state.step < last <= self.count:
            raise ValueError(f"run(until={until}) must be in ({state.step}, {self.count}].")
        self.meter.charge(rows=len(state.latents) * (last - state.step))
        x, keys = state.latents, _keys(state.rng)
        for step in range(state.step, last):
            x0 = self.chain.predict(self.model, x, step)
            shift = drift if step == state.step else None
            transition = Transition(self.chain.mean(x, x0, step), self.chain.std(step), shift)
            x = transition.mean if shift is None else transition.mean + shift
            if transition.std > 0.0:
                keys, noise = _normals(keys, self.model.size)
                x = x + transition.std * noise
        return State(x, last, self.count, _rng(keys), x0=x0, transition=transition)

    def redraw(self, state: State, seeds: Sequence[int]) -> State:
        """Other outcomes of the last evaluation, without making it again."""
        law = state.transition
        if law is None or law.std == 0.0:
            raise ValueError("redraw needs a state whose last evaluation drew noise.")
        keys, noise = _normals(_keys(state.reseed(seeds).rng), self.model.size)
        mean = law.mean if law.drift is None else law.mean + law.drift
        return replace(state, latents=mean + law.std * noise, rng=_rng(keys))

    def renoise(self, state: State, to: int, seeds: Sequence[int]) -> State:
        """Noise added by the forward process, back to evaluation ``to``."""
        if not 0 <= to < state.step:
            raise ValueError(f"renoise(to={to}) must be in [0, {state.step}).")
        chain, step = self.chain, state.step
        ratio = chain.signal[to] / chain.signal[step]
        std = (chain.noise[to] ** 2 - (ratio * chain.noise[step]) ** 2) ** 0.5
        keys, noise = _normals(_mix(np.array(seeds, dtype=np.uint64)), self.model.size)
        return State(ratio * state.latents + std * noise, to, self.count, _rng(keys))

    def preview(self, state: State) -> Tensor:
        """Images of what the last evaluation predicted."""
        if state.x0 is None:
            raise ValueError("preview needs a state that has been run.")
        self.meter.charge(decodes=len(state.latents))
        return pixels(state.x0)

    def decode(self, state: State) -> Tensor:
        """Images of finished states."""
        if not state.finished:
            raise ValueError(f"decode needs a finished state; got step {state.step}.")
        self.meter.charge(decodes=len(state.latents))
        return pixels(state.latents)

    def twist(self, state: State, reward: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Reward of the predicted image [B] and its gradient with respect to the latents [B, D]."""
        rows = len(state.latents)
        self.meter.charge(rows=rows, decodes=rows, backward=rows)
        with torch.enable_grad():
            x = state.latents.detach().requires_grad_()
            values = reward(pixels(self.chain.predict(self.model, x, state.step)))
            (gradient,) = torch.autograd.grad(values.sum(), x)
        return values.detach(), gradient

    def render(
        self,
        noise: Tensor,
        grad: bool = True,
        mode: Mode = "checkpoint",
        clamp: Clamp = "hard",
        seeds: Sequence[int] | None = None,
    ) -> Tensor:
        """Images of start noise [B, D], differentiable; ``seeds`` fix the noise of the steps."""
        numbers = range(len(noise)) if seeds is None else seeds
        state = self.start(list(numbers), noise)
        self.meter.charge(decodes=len(noise), backward=len(noise) if grad else 0)
        with torch.set_grad_enabled(grad):
            return pixels(self.run(state).latents)


@dataclass(slots=True)
class _Shared:
    """What variants of a problem have in common."""

    seeds: int = 0
    best: Candidate | None = None
    # NFE of the final call
    price: int = 0


class NoVideo:
    """What a problem of videos has and one of points has not."""

    def look(self, state: State, evaluations: int) -> State:
        """A point is no video."""
        raise UnsupportedModel("A point is not made chunk after chunk.")

    def marks(self, state: State, prompt: str, stage: Stage | None = None) -> Marks:
        """A point is no video."""
        raise UnsupportedModel("A point is not made chunk after chunk.")


@dataclass(slots=True)
class PointProblem(NoVideo):
    """A ``Problem`` of points; ``toy`` makes it."""

    models: Callable[[str], Denoiser]
    chain: Chain
    reward: Reward
    prompt: str = "a point"
    base: int = 0
    meter: Meter = field(default_factory=Meter)
    # images that the budget keeps back for the final call
    reserve: int = 0
    text: str | None = None
    # whether its images are never the best
    draft: bool = False
    shared: _Shared = field(default_factory=_Shared)
    processes: int = 1
    rng: torch.Generator = field(init=False)
    sampler: PointSampler = field(init=False)

    def __post_init__(self) -> None:
        self.rng = torch.Generator().manual_seed(seed_of(self.prompt, -1, self.base))
        model = self.models(self.prompt if self.text is None else self.text)
        self.sampler = PointSampler(model, self.chain, self.meter)
        if not self.draft:
            self.shared.price = self.sampler.price()

    @property
    def best(self) -> Candidate | None:
        """The best finished image so far."""
        return self.shared.best

    def seeds(self, count: int) -> list[int]:
        """Those of the next images of the prompt."""
        first = self.shared.seeds
        self.shared.seeds += count
        return [seed_of(self.prompt, first + i, self.base) for i in range(count)]

    def room(self, count: int, first: int = 0, last: int | None = None, scores: int = 1) -> int:
        """How many of ``count`` images the budget lets run."""
        if count < 1:
            raise ValueError(f"room(count={count}) must be at least 1.")
        kept = (self.reserve * self.shared.price, self.reserve)
        return _room(self.meter, count, self.sampler.price(first, last), scores, kept)

    def start(self, seeds: Sequence[int], noise: Tensor | None = None) -> State:
        """States before the first evaluation."""
        return self.sampler.start(seeds, noise)

    def run(self, state: State, until: int | None = None, drift: Tensor | None = None) -> State:
        """Continue to evaluation ``until``."""
        return self.sampler.run(state, until, drift)

    def twist(self, state: State) -> tuple[Tensor, Tensor]:
        """Scores [B] of the next prediction and their gradient in the latents."""
        self.meter.charge(rewards=len(state.latents))
        return self.sampler.twist(state, lambda images: self.reward(images, []))

    def decode(self, state: State) -> Tensor:
        """The images of finished states."""
        return self.sampler.decode(state)

    def preview(self, state: State) -> Tensor:
        """Scores [B] of the predicted images."""
        return self.score(self.sampler.preview(state))

    def finish(
        self, state: State, lineages: Sequence[Lineage], *, parts: bool = False
    ) -> list[Candidate]:
        """Decode and score finished states; the reward has no ``parts`` here."""
        images = self.sampler.decode(state)
        return self._candidates(images, self.score(images), lineages)

    def _candidates(
        self, images: Tensor, scores: Tensor, lineages: Sequence[Lineage]
    ) -> list[Candidate]:
        """Finished images, remembered unless they are drafts."""
        candidates = [
            Candidate(float(score), image.float(), lineage)
            for score, image, lineage in zip(scores, images, lineages, strict=True)
        ]
        if not self.draft:
            for candidate in candidates:
                if self.shared.best is None or candidate.score > self.shared.best.score:
                    self.shared.best = candidate
        return candidates

    def score(self, images: Tensor) -> Tensor:
        """Scores [B]; checked for shape and for numbers that are none."""
        self.meter.charge(rewards=len(images))
        scores = self.reward(images, [self.prompt] * len(images)).double()
        if scores.shape != (len(images),) or not bool(scores.isfinite().all()):
            raise ValueError(f"reward must return {len(images)} finite scores; got {scores}.")
        return scores

    def ascend(
        self,
        noise: Tensor,
        seeds: Sequence[int],
        *,
        parts: bool = False,
        mode: Mode = "checkpoint",
        clamp: Clamp = "hard",
    ) -> Ascent:
        """Images of start noise, their scores and the gradient of each part."""
        pairs = parts_of(self.reward, self.prompt, parts)
        rows = len(noise)
        self.meter.charge(rewards=rows * len(pairs), backward=rows * (len(pairs) - 1))
        leaf = noise.detach().clone().requires_grad_()
        images = self.sampler.render(leaf, True, mode, clamp, seeds)
        slopes = _slopes(images, leaf, self.prompt, pairs)
        finite = [i for i in range(rows) if slopes.total[i].isfinite()]
        lineages = [Lineage((Move(0, seeds[i]),), noise[i].detach().clone()) for i in finite]
        scores = slopes.total[finite]
        return slopes.ascent(self._candidates(images.detach()[finite], scores, lineages))

    def lean(
        self,
        noise: Tensor,
        seeds: Sequence[int],
        shift: Shift,
        *,
        mode: Mode = "checkpoint",
        clamp: Clamp = "hard",
    ) -> tuple[Tensor, Tensor]:
        """A point has no token embeddings."""
        raise ValueError("The text of a point has no token embeddings.")

    def variant(
        self,
        techniques: Sequence[Technique] | None = None,
        call: Mapping[str, Any] | None = None,
        prompt: str | None = None,
        cache: float | None = None,
        shift: Shift | None = None,
    ) -> PointProblem:
        """The problem with other ``num_inference_steps`` or another text; it knows no technique."""
        others = set(call or {}) - {"num_inference_steps"}
        if cache is not None or shift is not None or techniques or others:
            raise ValueError(
                f"variant(call=...) of a point takes num_inference_steps; got {call}, {techniques}."
            )
        steps = (call or {}).get("num_inference_steps", self.chain.count)
        chain = self.chain
        if steps != chain.count:
            chain = Chain.of_steps(steps, chain.eta)
        text = self.prompt if prompt is None else prompt
        draft = self.draft or techniques is not None or bool(call)
        other = replace(self, chain=chain, text=text, draft=draft)
        other.rng = self.rng
        return other


def _room(meter: Meter, count: int, price: int, scores: int, reserve: tuple[int, int]) -> int:
    """How many of ``count`` images the budget lets run beside the (rows, images) kept back."""
    budget, (rows, images) = meter.budget, reserve
    shares = [
        (budget.nfe, meter.rows + rows, price),
        (budget.decodes, meter.decodes + images, scores),
        (budget.rewards, meter.rewards + images, scores),
    ]
    fits = [count, *((limit - spent) // each for limit, spent, each in shares if limit and each)]
    if min(fits) < 1:
        raise BudgetExceeded(f"{budget} is used up: one more image takes {price} NFE.")
    return min(fits)


def _slopes(
    images: Tensor, leaf: Tensor, prompt: str, parts: Sequence[tuple[float, Reward]]
) -> Slopes:
    """Scores and gradients of each part; a gain is that of the chain, without the pixels."""
    values, gradients, gains = [], [], []
    for _, reward in parts:
        scores = reward(images, [prompt] * len(images)).double()
        gradient, slope = torch.autograd.grad(scores.sum(), (leaf, images), retain_graph=True)
        values.append(scores.detach())
        gradients.append(gradient.float())
        gains.append(gradient.norm(dim=1) / (slope.sum(1)[:, 0] / (2 * SPAN)).norm(dim=1))
    weights = tuple(weight for weight, _ in parts)
    return Slopes(weights, *map(torch.stack, (values, gradients, gains)))


def toy(
    model: Denoiser | Callable[[str], Denoiser],
    function: Function | Sequence[tuple[float, Function]],
    *,
    chain: Chain | int = 10,
    budget: Meter | None = None,
    seed: int = 0,
    differentiable: bool = True,
    reserve: int = 0,
) -> PointProblem:
    """A problem of points. ``model`` may depend on the text; ``chain``: or its evaluations;
    ``function``: or weighted parts."""
    models = model if callable(model) else lambda text: model
    levels = Chain.of_steps(chain) if isinstance(chain, int) else chain
    reward: Reward
    if callable(function):
        reward = PointReward(function, differentiable)
    else:
        parts = [(weight, PointReward(part, differentiable)) for weight, part in function]
        reward = PointSum(parts, differentiable)
    meter = budget if budget is not None else Meter()
    return PointProblem(models, levels, reward, base=seed, meter=meter, reserve=reserve)


def solve(
    problem: PointProblem, method: Method[S], rounds: int | None = None
) -> tuple[S, list[Info]]:
    """Step until the method is finished, the budget is used up or ``rounds`` are over.

    Raises: ValueError for a method that cannot act, as ``align`` does.
    """
    alike = problem.sampler.deterministic if method.branches else None
    reason = alike or method.refuses(problem)
    if reason is not None:
        raise ValueError(reason)
    state = method.init(problem)
    infos: list[Info] = []
    while not method.finished(state) and (rounds is None or len(infos) < rounds):
        try:
            state, info = method.step(problem, state)
        except BudgetExceeded:
            break
        infos.append(info)
    return state, infos


def replay(problem: PointProblem, lineage: Lineage) -> Tensor:
    """The point [D] of an image, made again by the moves of its lineage alone."""
    first, *others = lineage.moves
    noise = None if lineage.noise is None else lineage.noise[None]
    sampler = replace(problem, meter=Meter()).sampler
    state = sampler.start([first.seed], noise)
    for move in others:
        state = _led(sampler, state, move.step, lineage)
        if move.back is None:
            state = state.reseed([move.seed])
        else:
            state = sampler.renoise(state, move.back, [move.seed])
    return _led(sampler, state, state.count, lineage).latents[0]


def _led(sampler: PointSampler, state: State, until: int, lineage: Lineage) -> State:
    """The state at evaluation ``until``, step by step with the drifts of its lineage."""
    drifts = dict(lineage.drifts)
    while state.step < until:
        drift = drifts.get(state.step)
        state = sampler.run(state, state.step + 1, None if drift is None else drift[None])
    return state


def _mix(keys: np.ndarray) -> np.ndarray:
    """Splitmix64's output function: neighbouring numbers become unrelated ones."""
    with np.errstate(over="ignore"):
        keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = keys ^ (keys >> np.uint64(31))
    return mixed


def _normals(keys: np.ndarray, count: int) -> tuple[np.ndarray, Tensor]:
    """Advanced keys [B], and standard normal numbers [B, count] that each row's key alone fixes."""
    steps = np.arange(1, 2 * count + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        bits = _mix(keys[:, None] + steps * _GOLDEN)
        advanced = keys + steps[-1] * _GOLDEN
    uniform = torch.from_numpy(((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)
    radius = (-2.0 * uniform[:, :count].log()).sqrt()
    return advanced, radius * torch.cos(2 * torch.pi * uniform[:, count:])


def _rng(keys: np.ndarray) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(keys.view(np.int64).copy()).unbind())


def _keys(rng: Sequence[Tensor]) -> np.ndarray:
    """Keys of rows; the state of a torch generator, as ``State.reseed`` makes, begins with its
    seed."""
    numbers = [t if t.ndim == 0 else t[:8].view(torch.int64)[0] for t in rng]
    fresh = np.array([t.ndim > 0 for t in rng])
    keys = torch.stack(numbers).numpy().view(np.uint64)
    return np.where(fresh, _mix(keys ^ _GOLDEN), keys)
