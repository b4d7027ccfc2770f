"""Prompt search: other wordings of the prompt, tried on a generator that stays as it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean, pstdev, stdev
from typing import Literal

import torch

from diffalign.core.option import option
from diffalign.core.search import Info, Least, Method, Problem
from diffalign.search.prompt_author import Author
from diffalign.search.prompt_pool import Entry, Pool, contest, draw, sizes, smaller
from diffalign.search.rewriters import LanguageModel, Rewriter, Rules

COMPARED = 2 + 2
"""Images of the original and one wording, once in a round and once in the last comparison."""


@dataclass(frozen=True)
class PromptSearch(Method[Pool]):
    """Let a rewriter word the prompt anew, told which wordings scored well; compare at the end.

    Each round draws every prompt of the pool from the same fresh noises and scores the images
    against the original prompt. The original is always in the pool; wordings that no longer state
    its things, numbers, colours or relations are dropped. ``halving`` draws once from each and
    again only from the better half. At the end the best wording and the original are drawn from
    noises that were not used before: the reported gain is of these alone, and the found prompt is
    the original where it is not above 0. The result is the best image of all.

    Strategies: ``evolve`` keeps the best ``keep`` and asks for wordings of them; ``climb`` goes on
    from the best one; ``anneal`` also goes to a worse one with probability ``exp(difference /
    temperature)``, which falls linearly to 0 from ``heat`` standard deviations of the original's
    scores, and keeps the best one in the pool; ``genetic`` crosses two of the best and lets the
    rewriter change every second child; ``random`` asks for wordings of any known ones and tells no
    score: the baseline.
    ``rewriter``: ``rules``, the folder of a local text-generation model, or a function
    ``(original, best, worst, count) -> list of prompts``.

    Paper: Ji et al. 2024, arXiv:2412.15156 (reward-guided prompt evolution, its part without
    training); climbing with good and bad examples: Liu et al. 2023, arXiv:2309.05950.
    Cost: a trajectory, a decoded and a scored image for each draw: ``draws`` for the original;
    then, in each round, at most (keep + children + 1) x draws; 2 x ``final`` at the end.
    """

    strategy: Literal["evolve", "climb", "anneal", "genetic", "random"] = option(
        "evolve", "where the next prompts come from"
    )
    rewriter: str | Rewriter = option(
        "rules", "rules, the folder of a local language model, or a function", saved="objects"
    )
    children: int = option(4, "wordings asked for in a round", low=1)
    keep: int = option(3, "prompts that a round keeps", low=1)
    rounds: int | None = option(3, "rounds, none for as many as the budget allows", low=1)
    draws: int = option(2, "noises of a round", low=1)
    halving: bool = option(True, "whether only the better half is drawn again")
    final: int = option(4, "noises of the final comparison", low=1)
    heat: float = option(1.0, "temperature of annealing at the start", low=0.0)

    @property
    def author(self) -> Author:
        """What asks the rewriter."""
        return Author(self.writer, self.strategy, self.keep)

    def check(self) -> None:
        if self.strategy == "anneal" and self.draws < 2:
            raise ValueError(
                f"PromptSearch(draws={self.draws}) must be at least 2 with strategy='anneal': its "
                "temperature is in standard deviations of the original's scores. Use climb."
            )

    @property
    def ends(self) -> bool:
        return self.rounds is not None

    @cached_property
    def writer(self) -> Rewriter:
        """The rewriter as a function."""
        if not isinstance(self.rewriter, str):
            return self.rewriter
        return Rules() if self.rewriter == "rules" else LanguageModel(self.rewriter)

    @property
    def fewest(self) -> int:
        """Images of the original that the search begins with, at least."""
        return 2 if self.strategy == "anneal" else 1

    def least(self, problem: Problem) -> Least:
        images = self.fewest + COMPARED
        return Least(images * problem.sampler.price(), images, images)

    def init(self, problem: Problem) -> Pool:
        return Pool(parents=(problem.prompt,), best=problem.prompt)

    def step(self, problem: Problem, state: Pool) -> tuple[Pool, Info]:
        if not state.entries:
            return self._first(problem, state)
        over = self.rounds is not None and state.rounds >= self.rounds
        children, dropped = ([], 0) if over else self.author.children(problem, state, self.children)
        prompts, draws = _round(self, problem, state, children)
        if not prompts:
            return self._compare(problem, state)
        entries = contest(problem, prompts, draws, self.halving)
        rounds = state.rounds + 1
        parents = tuple(entry.prompt for entry in entries[: self.keep])
        if self.strategy == "climb":
            parents = parents[:1]
        if self.strategy == "anneal":
            share = 1.0 - rounds / (self.rounds or rounds + 1)
            uniform = float(torch.rand((), generator=problem.rng))
            heat = self.heat * state.spread * share
            parents = (_annealed(state, problem.prompt, entries, heat, uniform),)
        known = (*state.known, *(text for text in prompts if text not in state.known))
        later = replace(
            state,
            entries=entries,
            parents=parents,
            best=entries[0].prompt,
            known=known,
            rounds=rounds,
        )
        original = next(entry for entry in entries if entry.prompt == problem.prompt)
        values = {
            "best": entries[0].mean,
            "original": original.mean,
            "prompts": len(prompts),
            "dropped": dropped,
        }
        return later, Info(f"round {rounds}: {entries[0].prompt!r}", values)

    def finished(self, state: Pool) -> bool:
        return state.winner is not None

    def _first(self, problem: Problem, state: Pool) -> tuple[Pool, Info]:
        room = problem.room(self.draws + COMPARED)
        count = min(self.draws, room, max(room - COMPARED, self.fewest))
        scores = draw(problem, problem.prompt, problem.seeds(count))
        entry = Entry(problem.prompt, tuple(scores))
        pool = replace(state, entries=(entry,), known=(entry.prompt,), spread=pstdev(scores))
        return pool, Info("the original prompt", {"original": entry.mean})

    def _compare(self, problem: Problem, state: Pool) -> tuple[Pool, Info]:
        """The best wording beside the original, on noises that were not used before."""
        original, champion = problem.prompt, state.best
        count = 0 if champion == original else problem.room(2 * self.final) // 2
        if count == 0:
            text = "no wording is better" if state.rounds else "no wording was tried"
            text = text if champion == original else "no budget is left for the comparison"
            return replace(state, winner=original), Info(text, {"gain": 0.0})
        seeds = problem.seeds(count)
        scores = [draw(problem, prompt, seeds) for prompt in (original, champion)]
        gains = [after - before for before, after in zip(*scores, strict=True)]
        gain = fmean(gains)
        error = stdev(gains) / math.sqrt(count) if count > 1 else 0.0
        winner = champion if gain > 0 else original
        values = {"gain": gain, "error": error}
        text = f"on fresh noises {champion!r} gains {gain:+.4f}"
        return replace(state, winner=winner, gain=gain, error=error), Info(text, values)


def _round(
    method: PromptSearch, problem: Problem, state: Pool, children: Sequence[str]
) -> tuple[list[str], int]:
    """Prompts of a round and its noises, none where what is left is for the comparison.

    The first round has fewer of both where the budget holds no whole one.
    """
    number, draws, final = len(children), method.draws, method.final
    known, room = (*state.parents, problem.prompt, state.best), None
    while number:
        prompts = list(dict.fromkeys((*known, *children[:number])))
        images = sum(sizes(len(prompts), draws, method.halving)) + 2 * final
        room = problem.room(images) if room is None else room
        if images <= room:
            return prompts, draws
        if state.rounds or number == draws == final == 1:
            break
        number, draws, final = smaller(number, draws, final)
    return [], 0


def _annealed(
    state: Pool, original: str, entries: Sequence[Entry], temperature: float, uniform: float
) -> str:
    """The current prompt, or the best new one: uphill always, downhill by chance."""
    (current,) = (entry for entry in entries if entry.prompt == state.parents[0])
    old = (current.prompt, original, state.best)
    other = next(entry for entry in entries if entry.prompt not in old)
    # after halving one noise may be all that the two have in common
    difference = fmean(b - a for a, b in zip(current.scores, other.scores, strict=False))
    downhill = temperature > 0 and uniform < math.exp(min(difference / temperature, 0.0))
    return other.prompt if difference > 0 or downhill else current.prompt
