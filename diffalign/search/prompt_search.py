"""Prompt search: other wordings of the prompt, tried on a generator that stays as it is."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean, pstdev, stdev
from typing import Literal

import torch

from diffalign.core.option import option
from diffalign.core.search import Info, Method, Problem
from diffalign.search.prompt_pool import Entry, contest, draw, sizes
from diffalign.search.rewriters import LanguageModel, Rewriter, Rules, Scored
from diffalign.search.wording import crossed, loss


@dataclass(frozen=True, slots=True)
class Pool:
    """Where a search over prompts stands."""

    # of the last round, best first
    entries: tuple[Entry, ...] = ()
    # prompts that go on
    parents: tuple[str, ...] = ()
    # every prompt that was ever drawn
    known: tuple[str, ...] = ()
    rounds: int = 0
    # standard deviation of the original's scores: the unit of annealing
    spread: float = 0.0
    # the found prompt, None before the final comparison
    winner: str | None = None
    # mean gain over the original on fresh noises, and its standard error
    gain: float = 0.0
    error: float = 0.0


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
    scores; ``genetic`` crosses two of the best and lets the rewriter change every second child;
    ``random`` asks for wordings of any known ones and tells no score: the baseline.
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
    def ends(self) -> bool:
        return self.rounds is not None

    @cached_property
    def writer(self) -> Rewriter:
        """The rewriter as a function."""
        if not isinstance(self.rewriter, str):
            return self.rewriter
        return Rules() if self.rewriter == "rules" else LanguageModel(self.rewriter)

    def init(self, problem: Problem) -> Pool:
        return Pool(parents=(problem.prompt,))

    def step(self, problem: Problem, state: Pool) -> tuple[Pool, Info]:
        if not state.entries:
            return self._first(problem, state)
        over = self.rounds is not None and state.rounds >= self.rounds
        children, dropped = ([], 0) if over else self._children(problem, state)
        prompts, draws = self._round(problem, state, children)
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
        later = replace(state, entries=entries, parents=parents, known=known, rounds=rounds)
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

    def _round(
        self, problem: Problem, state: Pool, children: Sequence[str]
    ) -> tuple[list[str], int]:
        """Prompts of a round and its noises, none where what is left is for the comparison.

        The first round has fewer of both where the budget holds no whole one.
        """
        number, draws, final = len(children), self.draws, self.final
        room = None
        while number:
            prompts = list(dict.fromkeys((*state.parents, problem.prompt, *children[:number])))
            images = sum(sizes(len(prompts), draws, self.halving)) + 2 * final
            room = problem.room(images) if room is None else room
            if images <= room:
                return prompts, draws
            if state.rounds or number == draws == final == 1:
                break
            if final >= max(number, draws):
                final -= 1
            elif number >= draws:
                number -= 1
            else:
                draws -= 1
        return [], 0

    def _first(self, problem: Problem, state: Pool) -> tuple[Pool, Info]:
        # the original and a wording, once in the first round and once in the comparison
        rest = 2 + 2
        count = min(self.draws, max(problem.room(self.draws + rest) - rest, 1))
        scores = draw(problem, problem.prompt, problem.seeds(count))
        entry = Entry(problem.prompt, tuple(scores))
        pool = replace(state, entries=(entry,), known=(entry.prompt,), spread=pstdev(scores))
        return pool, Info("the original prompt", {"original": entry.mean})

    def _children(self, problem: Problem, state: Pool) -> tuple[list[str], int]:
        """New wordings that state the same, and how many answers were dropped."""
        original, dropped = problem.prompt, 0
        children: list[str] = []
        # an answer may hold too few new ones: ask for more
        for asked in (self.children, 2 * self.children, 2 * self.children + len(state.known)):
            answer = self._ask(problem, state, asked)
            fresh = [text for text in dict.fromkeys(answer) if text not in state.known]
            children = [text for text in fresh if loss(original, text) is None]
            dropped = max(asked - len(children), 0)
            if len(children) >= self.children:
                break
        return children[: self.children], dropped

    def _ask(self, problem: Problem, state: Pool, count: int) -> list[str]:
        original = problem.prompt
        if self.strategy == "random":
            order = torch.randperm(len(state.known), generator=problem.rng).tolist()[: self.keep]
            return self.writer(original, [(state.known[i], 0.0) for i in order], [], count)
        ranked: list[Scored] = [(entry.prompt, entry.mean) for entry in state.entries]
        best = [pair for pair in ranked if pair[0] in state.parents]
        worst = [pair for pair in reversed(ranked) if pair[0] not in state.parents][: self.keep]
        if self.strategy != "genetic" or len(best) < 2:
            return self.writer(original, best, worst, count)
        rng = random.Random(int(torch.randint(2**62, (), generator=problem.rng)))
        children = []
        for number in range(count):
            (first, score), (second, other) = rng.sample(best, 2)
            child = crossed(first, second, rng)
            if number % 2 or child in state.known:
                mutants = self.writer(original, [(child, (score + other) / 2)], worst, 1)
                child = mutants[0] if mutants else child
            children.append(child)
        return children

    def _compare(self, problem: Problem, state: Pool) -> tuple[Pool, Info]:
        """The best wording beside the original, on noises that were not used before."""
        original, champion = problem.prompt, state.entries[0].prompt
        count = 0 if champion == original else problem.room(2 * self.final) // 2
        if count == 0:
            tried = "is better" if champion == original and state.rounds else "could be compared"
            return replace(state, winner=original), Info(f"no wording {tried}", {"gain": 0.0})
        seeds = problem.seeds(count)
        scores = [draw(problem, prompt, seeds) for prompt in (original, champion)]
        gains = [after - before for before, after in zip(*scores, strict=True)]
        gain = fmean(gains)
        error = stdev(gains) / math.sqrt(count) if count > 1 else 0.0
        winner = champion if gain > 0 else original
        values = {"gain": gain, "error": error}
        text = f"on fresh noises {champion!r} gains {gain:+.4f}"
        return replace(state, winner=winner, gain=gain, error=error), Info(text, values)


def _annealed(
    state: Pool, original: str, entries: Sequence[Entry], temperature: float, uniform: float
) -> str:
    """The current prompt, or the best new one: uphill always, downhill by chance."""
    (current,) = (entry for entry in entries if entry.prompt == state.parents[0])
    other = next(e for e in entries if e.prompt not in (current.prompt, original))
    # after halving one noise may be all that the two have in common
    difference = fmean(b - a for a, b in zip(current.scores, other.scores, strict=False))
    downhill = temperature > 0 and uniform < math.exp(min(difference / temperature, 0.0))
    return other.prompt if difference > 0 or downhill else current.prompt
