"""SAGE's search in prompts: natural words around a subject with which it goes missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from diffalign.core.sampler import Mode
from diffalign.core.search import Candidate, Info, Lineage, Move, Problem
from diffalign.core.words import Shift
from diffalign.noise_opt.hunt import Hunt, Phrase, judged
from diffalign.tasks.geneval.verdict import class_names

WORDS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white",
    "small", "large", "tiny", "big", "old", "new", "bright", "dark", "shiny", "wooden", "metal",
    "broken", "wet", "dirty", "clean", "soft", "round", "flat", "happy", "sad", "sleeping",
    "hidden", "distant", "blurry", "outside", "indoors", "underwater", "upside", "alone",
    "together", "left", "right", "above", "below", "photo", "picture", "image", "drawing",
)  # fmt: skip
"""Plain words that may stand beside a subject."""
SLOT = "{}"


@dataclass(frozen=True)
class PromptHunt:
    """A beam of prompts; the gradient in the word embeddings proposes, images decide."""

    template: str
    words: tuple[str, ...]
    rounds: int
    seeds: int
    candidates: int
    beam: int
    gradient: Mode

    def search(self, problem: Problem, hunt: Hunt) -> tuple[Hunt, Info]:
        words = self.usable(problem)
        if not hunt.beam:
            order = torch.randperm(len(words), generator=problem.rng).tolist()
            slots = self.template.count(SLOT)
            picks = [order[i * slots : (i + 1) * slots] for i in range(self.beam)]
            fillings = [tuple(words[i] for i in pick) for pick in picks if len(pick) == slots]
        else:
            fillings = self.proposals(problem, hunt, words)
        known = {phrase.words for phrase in hunt.beam}
        fresh = [filling for filling in dict.fromkeys(fillings) if filling not in known]
        seeds = problem.seeds(self.seeds)
        phrases = [self.phrase(problem, filling, seeds) for filling in fresh]
        ranked = sorted((*hunt.beam, *phrases), key=lambda phrase: -phrase.score)
        total = hunt.total + len(fresh) * self.seeds + (len(hunt.beam) * self.seeds)
        number = hunt.iteration + 1
        hunt = replace(hunt, beam=tuple(ranked[: self.beam]), iteration=number, total=total)
        best = hunt.beam[0]
        numbers = {"score": best.score, "confirmed": best.tally.rate, "tried": len(fresh)}
        over = number >= self.rounds or best.tally.rate == 1.0 or not fresh
        after = replace(hunt, phase="fresh") if over else hunt
        return after, Info(f"round {number}: {best.prompt!r}", numbers)

    def usable(self, problem: Problem) -> tuple[str, ...]:
        """Words of one token that name no class which the prompt does not name."""
        tower, prompt = problem.sampler.words, problem.prompt.lower()
        others = {name for name in class_names() if name not in prompt}
        return tuple(
            word
            for word in self.words
            if len(tower.tokens(word)) == 1 and word not in others and word not in prompt.split()
        )

    def phrase(self, problem: Problem, filling: tuple[str, ...], seeds: Sequence[int]) -> Phrase:
        """A prompt drawn once from each seed."""
        text = self.template.format(*filling)
        candidates = images_of(problem, text, seeds)
        score = sum(candidate.score for candidate in candidates) / len(candidates)
        return Phrase(text, filling, score, judged(problem, candidates))

    def proposals(
        self, problem: Problem, hunt: Hunt, words: Sequence[str]
    ) -> list[tuple[str, ...]]:
        """One word of one prompt changed, the changes that the gradient likes best first."""
        tower = problem.sampler.words
        ids = [tower.tokens(word)[0] for word in words]
        table = tower.table[ids].float()
        seeds = problem.seeds(self.seeds)
        scored: list[tuple[float, tuple[str, ...]]] = []
        for phrase in hunt.beam:
            variant = problem.variant(prompt=phrase.prompt)
            tokens = tower.tokens(phrase.prompt)
            start = variant.start(seeds).latents
            shift = Shift(tuple(tokens), torch.zeros(len(tokens), table.shape[1]))
            _, slope = variant.lean(start, seeds, shift, mode=self.gradient)
            for slot, word in enumerate(phrase.words):
                place = self.place(problem, phrase.words, slot)
                before = tower.table[tower.tokens(word)[0]].float()
                gains = (table - before) @ slope[place].to(table)
                for gain, other in zip(gains.tolist(), words, strict=True):
                    changed = (*phrase.words[:slot], other, *phrase.words[slot + 1 :])
                    scored.append((gain, changed))
        scored.sort(key=lambda pair: -pair[0])
        return [filling for _, filling in scored[: self.candidates]]

    def place(self, problem: Problem, words: tuple[str, ...], slot: int) -> int:
        """Where the word of a slot stands among the tokens of the prompt."""
        before = SLOT.join(self.template.split(SLOT)[: slot + 1]).format(*words[:slot])
        return len(problem.sampler.words.tokens(before))

    def fresh(self, problem: Problem, hunt: Hunt, count: int) -> list[Candidate]:
        return images_of(problem, hunt.beam[0].prompt, problem.seeds(count))

    def random(self, problem: Problem, hunt: Hunt, count: int) -> list[Candidate]:
        """Random words in the slots, a prompt for each image."""
        words, slots = self.usable(problem), self.template.count(SLOT)
        candidates = []
        for seed in problem.seeds(count):
            picks = torch.randperm(len(words), generator=problem.rng)[:slots].tolist()
            text = self.template.format(*(words[i] for i in picks))
            candidates += images_of(problem, text, [seed])
        return candidates


def images_of(problem: Problem, prompt: str, seeds: Sequence[int]) -> list[Candidate]:
    """Images of another prompt."""
    variant = problem.variant(prompt=prompt)
    lineages = [Lineage((Move(0, seed),)) for seed in seeds]
    return variant.finish(variant.run(variant.start(seeds)), lineages)
