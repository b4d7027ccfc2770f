"""Where the prompts of a round come from: a rewriter, asked by a strategy."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from diffalign.core.search import Problem
from diffalign.search.prompt_pool import Pool
from diffalign.search.rewriters import Rewriter, Scored
from diffalign.search.wording import crossed, loss


@dataclass(frozen=True, slots=True)
class Author:
    """Asks a rewriter for wordings of the prompts that a strategy chooses."""

    writer: Rewriter
    strategy: str
    # prompts that a round keeps
    keep: int

    def children(self, problem: Problem, state: Pool, count: int) -> tuple[list[str], int]:
        """New wordings that state the same, and how many answers were dropped."""
        original, dropped = problem.prompt, 0
        children: list[str] = []
        # an answer may hold too few new ones: ask for more
        for asked in (count, 2 * count, 2 * count + len(state.known)):
            answer = self._ask(problem, state, asked)
            fresh = [text for text in dict.fromkeys(answer) if text not in state.known]
            children = [text for text in fresh if loss(original, text) is None]
            dropped = max(asked - len(children), 0)
            if len(children) >= count:
                break
        return children[:count], dropped

    def _ask(self, problem: Problem, state: Pool, count: int) -> list[str]:
        original = problem.prompt
        if self.strategy == "random":
            order = torch.randperm(len(state.known), generator=problem.rng).tolist()[: self.keep]
            return self._write(original, [(state.known[i], 0.0) for i in order], [], count)
        ranked: list[Scored] = [(entry.prompt, entry.mean) for entry in state.entries]
        best = [pair for pair in ranked if pair[0] in state.parents]
        worst = [pair for pair in reversed(ranked) if pair[0] not in state.parents][: self.keep]
        if self.strategy != "genetic" or len(best) < 2:
            return self._write(original, best, worst, count)
        rng = random.Random(int(torch.randint(2**62, (), generator=problem.rng)))
        children = []
        for number in range(count):
            (first, score), (second, other) = rng.sample(best, 2)
            child = crossed(first, second, rng)
            if number % 2 or child in state.known:
                mutants = self._write(original, [(child, (score + other) / 2)], worst, 1)
                child = mutants[0] if mutants else child
            children.append(child)
        return children

    def _write(
        self, original: str, best: Sequence[Scored], worst: Sequence[Scored], count: int
    ) -> list[str]:
        """What the rewriter answers. Raises: TypeError for anything but a list of texts."""
        texts: object = self.writer(original, best, worst, count)
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise TypeError(
                f"PromptSearch(rewriter=...) must return a list of texts; got {texts!r:.80}."
            )
        return list(texts)
