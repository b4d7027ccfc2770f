"""PEZ: a prompt of real tokens that says what images, or a longer prompt, say."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.core.option import option
from diffalign.core.reward import Dual
from diffalign.core.search import Candidate, Info, Lineage, Method, Move, Problem
from diffalign.core.words import Words
from diffalign.noise_opt.steps import adam

CHUNK = 100
"""Iterations of one step of the run."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Where the search for a prompt stands."""

    # [R, M, D] float32: a soft prompt for each restart; None before the start
    soft: Tensor | None = None
    moments: tuple[Tensor, ...] = ()
    # features [N, F] of what the prompt is to say, of length 1
    targets: Tensor | None = None
    iteration: int = 0
    # tokens that may be used, bool [V] on the CPU
    allowed: Tensor | None = None
    # the best prompt so far, as tokens and as text, and its cosine as text
    tokens: tuple[int, ...] = ()
    text: str = ""
    cosine: float = -2.0
    # prompts whose text has other tokens than they had, of those that were the best
    altered: int = 0
    tried: int = 0
    # the best image of the found prompt
    choice: Candidate | None = None


@dataclass(frozen=True)
class PEZ(Method[Prompt]):
    """Search a prompt of a few real tokens that says what images, or the run's own prompt, say.

    A soft prompt is projected to the nearest tokens of the vocabulary, by cosine; the gradient is
    taken there and moves the soft prompt. With ``images``, files or tensors [3, H, W] in [0, 1],
    the prompt is found from them; without, the run's own prompt is said in ``tokens`` tokens. What
    counts is the cosine of the text as it is encoded again, and the best one is kept: it is
    ``result.lineage.prompt``. At the end images are drawn from it and from the run's prompt with
    the same seeds, and the reward compares them; the result is the best image of the found prompt.

    ``tower``: whose text encoder, the pipeline's first one, which images cannot be compared with,
    or the reward's, which must be an image-text model such as ``emoji-clip``. A prompt is good for
    models that read texts with the same encoder. ``vocabulary``: ``words`` are tokens that are
    read as themselves when they stand alone, ``all`` are all tokens.

    Paper: Wen et al. 2023, arXiv:2302.03668, algorithm 1.
    Differs from the paper: the found text is encoded again before it counts; words by default.
    Cost: iterations x restarts forward and backward passes of the text encoder, no denoiser; then 2
    x draws trajectories, decoded and scored images.
    """

    tokens: int = option(16, "tokens of the prompt", low=1)
    iterations: int = option(1000, "updates of the soft prompt", low=1)
    restarts: int = option(4, "soft prompts that are optimised side by side", low=1)
    rate: float = option(0.1, "learning rate of AdamW", low=0.0, open_low=True)
    decay: float = option(0.1, "decay of AdamW", low=0.0)
    images: tuple[str | Tensor, ...] = option(
        (),
        "files or tensors that the prompt is to describe, none for the prompt itself",
        saved="objects",
    )
    batch: int = option(1, "images that one update sees", low=1)
    tower: Literal["reward", "pipeline"] = option("reward", "whose text encoder is searched")
    vocabulary: Literal["words", "all"] = option("words", "tokens that may be used")
    banned: tuple[str, ...] = option((), "texts that the prompt must not contain")
    draws: int = option(4, "images of the found prompt, and of the run's own", low=1)

    def check(self) -> None:
        if self.images and self.tower == "pipeline":
            raise ValueError(
                "PEZ(images=..., tower='pipeline'): a pipeline's text encoder knows no images. Use "
                "tower='reward' with an image-text reward."
            )

    @property
    def ends(self) -> bool:
        return True

    def refuses(self, problem: Problem) -> str | None:
        if self.tower == "reward" and not isinstance(problem.reward, Dual):
            return (
                "the reward has no text encoder of its own to search in. Use an image-text reward "
                "such as emoji-clip, or tower='pipeline'."
            )
        room = self.words(problem).room
        if self.tokens > room:
            return f"a text has room for {room} tokens; tokens={self.tokens} is too many."
        return None

    def words(self, problem: Problem) -> Words:
        """The vocabulary that is searched."""
        if self.tower == "pipeline":
            return problem.sampler.words
        assert isinstance(problem.reward, Dual)
        return problem.reward.words

    def init(self, problem: Problem) -> Prompt:
        return Prompt()

    def step(self, problem: Problem, state: Prompt) -> tuple[Prompt, Info]:
        words = self.words(problem)
        state = self._start(problem, state, words) if state.soft is None else state
        if state.iteration >= self.iterations:
            return self._draw(problem, state)
        assert state.allowed is not None
        search = Search(words, state.allowed, self.banned)
        for _ in range(min(CHUNK, self.iterations - state.iteration)):
            state = search.update(state, self.chosen(problem, state), self.rate, self.decay)
        numbers = {"cosine": state.cosine, "iteration": state.iteration}
        return state, Info(f"{state.cosine:.3f} {state.text!r}", numbers)

    def _start(self, problem: Problem, state: Prompt, words: Words) -> Prompt:
        allowed = self.allowed(words)
        choices = allowed.nonzero()[:, 0]
        shape = (self.restarts, self.tokens)
        picks = torch.randint(len(choices), shape, generator=problem.rng)
        soft = words.table[choices[picks].to(words.table.device)].float()
        targets = self.targets(problem, words)
        return replace(state, soft=soft.clone(), targets=targets, allowed=allowed)

    def targets(self, problem: Problem, words: Words) -> Tensor:
        """Features [N, F], of length 1, of the images or of the run's prompt."""
        with torch.no_grad():
            if self.images and isinstance(problem.reward, Dual):
                rows = [problem.reward.image_features(pixels(image)) for image in self.images]
                features = torch.cat(rows)
            else:
                tokens = torch.tensor([words.tokens(problem.prompt)])
                features = words.features(tokens)
        return F.normalize(features.float(), dim=-1)

    def chosen(self, problem: Problem, state: Prompt) -> Tensor:
        """Target features of one update."""
        assert state.targets is not None
        count = len(state.targets)
        if count <= self.batch:
            return state.targets
        order = torch.randperm(count, generator=problem.rng)[: self.batch]
        return state.targets[order.to(state.targets.device)]

    def allowed(self, words: Words) -> Tensor:
        """Which tokens may be used, bool [V] on the CPU."""
        mask = alone(words) if self.vocabulary == "words" else torch.ones(len(words.table)) > 0
        mask = mask.clone()
        mask[list(words.marks)] = False
        for text in self.banned:
            mask[words.tokens(text)] = False
        return mask

    def _draw(self, problem: Problem, state: Prompt) -> tuple[Prompt, Info]:
        """Images of the found prompt and of the run's own."""
        seeds = problem.seeds(max(problem.room(2 * self.draws) // 2, 1))
        scores, candidates = [], []
        for text in (problem.prompt, state.text):
            variant = problem.variant(prompt=text)
            lineages = [Lineage((Move(0, seed),)) for seed in seeds]
            candidates = variant.finish(variant.run(variant.start(seeds)), lineages)
            scores.append(sum(c.score for c in candidates) / len(seeds))
        best = max(candidates, key=lambda candidate: candidate.score)
        numbers = {
            "cosine": state.cosine,
            "prompt": scores[0],
            "score": scores[1],
            "altered": state.altered / max(state.tried, 1),
        }
        return replace(state, choice=best), Info(f"found {state.text!r}", numbers)

    def finished(self, state: Prompt) -> bool:
        return state.choice is not None

    def best(self, problem: Problem, state: Prompt) -> Candidate | None:
        return state.choice


@dataclass(frozen=True)
class Search:
    """One vocabulary with what must not be said."""

    words: Words
    # bool [V]
    allowed: Tensor
    banned: tuple[str, ...] = ()

    def nearest(self, soft: Tensor) -> Tensor:
        """The allowed token nearest to each row of [R, M, D] by cosine, [R, M]."""
        table = F.normalize(self.words.table.float(), dim=-1)
        cosines = F.normalize(soft, dim=-1) @ table.T
        cosines[..., ~self.allowed.to(cosines.device)] = float("-inf")
        return cosines.argmax(-1)

    def update(self, state: Prompt, targets: Tensor, rate: float, decay: float) -> Prompt:
        """One projection, its gradient, one AdamW step; the best prompt is remembered."""
        assert state.soft is not None
        assert state.targets is not None
        tokens = self.nearest(state.soft)
        with torch.enable_grad():
            hard = self.words.table[tokens].float().requires_grad_()
            features = F.normalize(self.words.features(tokens, hard).float(), dim=-1)
            (gradient,) = torch.autograd.grad((features @ targets.T).mean(1).sum(), hard)
        cosines = (features.detach() @ state.targets.T).mean(1)
        state = self._remember(state, tokens, cosines)
        update, moments = adam(gradient, state.moments)
        assert state.soft is not None
        soft = state.soft * (1 - rate * decay) + rate * update
        return replace(state, soft=soft, moments=moments, iteration=state.iteration + 1)

    def _remember(self, state: Prompt, tokens: Tensor, cosines: Tensor) -> Prompt:
        """The state with a better prompt among the restarts, if its text is better too."""
        best = int(cosines.argmax())
        if float(cosines[best]) <= state.cosine:
            return state
        row: list[int] = tokens[best].tolist()
        text = self.words.text(row)
        again = self.words.tokens(text)
        state = replace(state, tried=state.tried + 1, altered=state.altered + (again != row))
        cosine = float(cosines[best]) if again == row else self.cosine(state, again)
        words = text.lower()
        if cosine <= state.cosine or any(word.lower() in words for word in self.banned):
            return state
        return replace(state, tokens=tuple(again), text=text, cosine=cosine)

    def cosine(self, state: Prompt, tokens: list[int]) -> float:
        """The mean cosine of a row of tokens with the targets."""
        assert state.targets is not None
        if not tokens:
            return -2.0
        with torch.no_grad():
            row = torch.tensor([tokens], device=state.targets.device)
            features = F.normalize(self.words.features(row).float(), dim=-1)
        return float((features @ state.targets.T).mean())


def alone(words: Words) -> Tensor:
    """Which tokens are read as themselves when they stand alone, bool [V]."""
    rows = [words.text([token]) for token in range(len(words.table))]
    whole = [words.tokens(text) == [token] and bool(text) for token, text in enumerate(rows)]
    return torch.tensor(whole)


def pixels(image: str | Tensor) -> Tensor:
    """One image as [1, 3, H, W] in [0, 1]. Raises: ValueError for a file that is none."""
    if isinstance(image, Tensor):
        if image.ndim != 3 or len(image) != 3:
            raise ValueError(f"PEZ(images=...) must be [3, H, W]; got {list(image.shape)}.")
        return image[None].float()
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(image) as file:
            rgb = file.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"PEZ(images=...): {image!r} cannot be read as an image.") from error
    data = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return data.view(1, rgb.height, rgb.width, 3).permute(0, 3, 1, 2).float() / 255
