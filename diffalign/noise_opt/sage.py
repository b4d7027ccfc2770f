"""SAGE: search for prompts, start noises or word embeddings with which a generator fails."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from diffalign.core.errors import warn_once
from diffalign.core.option import option
from diffalign.core.reward import Failures
from diffalign.core.search import Candidate, Info, Method, Problem
from diffalign.noise_opt.hunt import Hunt, Phase, Prey, judged
from diffalign.noise_opt.sage_embedding import EmbeddingSearch
from diffalign.noise_opt.sage_latent import LatentSearch
from diffalign.noise_opt.sage_prompt import SLOT, WORDS, PromptHunt
from diffalign.tasks.geneval.verdict import class_names


@dataclass(frozen=True)
class SAGE(Method[Hunt]):
    """Search what makes a generator fail, and confirm it. Experimental, for audits of models.

    The reward says what a failure is: ``rewards.Failure``, an ensemble that is searched with and a
    judge outside it that confirms. No failure counts without that judge. Three searches:
    ``latent`` climbs on the sphere of normal noise from plain starts until the image is a confirmed
    failure while the noise still passes the test of normality; ``prompt`` fills the slots
    of ``template`` with ``words``, which the gradient in the word embeddings proposes and images
    choose; ``embedding`` moves one free embedding behind the prompt. What was found is tried on
    fresh seeds (of a noise: noises around it), and beside it chance is tried with as many images
    as the search has made: ``result.log`` has both rates.

    Paper: Liu et al. 2023, arXiv:2306.00974.
    Differs from the paper: its code was never published; the searches follow its description, with
    defaults of ours, and a gradient that is exact or approximate as ``gradient`` says.
    Cost: iterations trajectories with a backward pass each; for prompts, rounds x (beam with a
    backward pass + candidates) x seeds; then confirmations trajectories, and those of chance.
    Refuses: rewards that do not say what a failure is.
    """

    needs_gradient = True

    search: Literal["latent", "prompt", "embedding"] = option("latent", "what is searched")
    iterations: int = option(100, "updates of a noise or an embedding", low=1)
    rate: float = option(
        0.01, "length of an update, as a share of the norm of noise", low=0.0, open_low=True
    )
    normality: float = option(1.0, "weight of DNO's log probability of the noise", low=0.0)
    gradient: Literal["checkpoint", "skip", "residual", "one_step", "plain"] = option(
        "checkpoint", "how gradients come back"
    )
    template: str = option(
        "", "prompt with {} for each free word; empty for the prompt with one before and behind"
    )
    words: tuple[str, ...] = option(WORDS, "words that the slots may take", nonempty=True)
    rounds: int = option(3, "rounds of the search in prompts", low=1)
    seeds: int = option(5, "start noises of a prompt or an update of an embedding", low=1)
    candidates: int = option(16, "prompts that a round tries", low=1)
    beam: int = option(4, "prompts that a round keeps", low=1)
    confirmations: int = option(20, "fresh images that confirm", low=1)
    threshold: float = option(0.8, "share of them that makes a failure", low=0.0, high=1.0)
    baseline: bool = option(True, "whether chance is tried at the same cost")

    @property
    def ends(self) -> bool:
        return True

    def refuses(self, problem: Problem) -> str | None:
        if not isinstance(problem.reward, Failures):
            return (
                "the reward does not say what a failure is. Use rewards.Failure(members, judge), "
                "or emoji-failure on the embedded models."
            )
        if self.gradient == "one_step" and problem.sampler.count != 1:
            return "gradient='one_step' needs a trajectory of one evaluation."
        if self.gradient == "residual" and self.search != "latent":
            return "gradient='residual' is of start noise; texts need 'checkpoint' or 'skip'."
        return None

    def prey(self, problem: Problem) -> Prey:
        """The search."""
        if self.search == "latent":
            return LatentSearch(self.iterations, self.rate, self.normality, self.gradient)
        if self.search == "embedding":
            return EmbeddingSearch(self.iterations, 10 * self.rate, self.seeds, self.gradient)
        return PromptHunt(
            self.template or around(problem.prompt),
            self.words,
            self.rounds,
            self.seeds,
            self.candidates,
            self.beam,
            self.gradient,
        )

    def init(self, problem: Problem) -> Hunt:
        warn_once("SAGE is experimental: its results are material for people to judge.")
        return Hunt()

    def step(self, problem: Problem, state: Hunt) -> tuple[Hunt, Info]:
        problem.room(1)
        prey = self.prey(problem)
        if state.phase == "search":
            return prey.search(problem, state)
        if state.phase == "fresh":
            return self._confirm(problem, state, prey)
        return self._chance(problem, state, prey)

    def _confirm(self, problem: Problem, state: Hunt, prey: Prey) -> tuple[Hunt, Info]:
        rest = self.confirmations - state.fresh.images
        candidates = prey.fresh(problem, state, problem.room(min(4, rest)))
        worst = max(candidates, key=lambda candidate: candidate.score)
        fresh = state.fresh + judged(problem, candidates)
        over = fresh.images == self.confirmations
        failure = state.failure
        if self.search != "latent" and (failure is None or worst.score > failure.score):
            failure = worst
        if over and fresh.rate < self.threshold and self.search != "latent":
            failure = None
        last: Phase = "random" if self.baseline else "done"
        phase: Phase = last if over else "fresh"
        after = replace(state, fresh=fresh, failure=failure, phase=phase)
        numbers = {"fresh": fresh.rate, "agreement": fresh.agreement}
        return after, Info(f"{fresh.images} fresh images", numbers)

    def _chance(self, problem: Problem, state: Hunt, prey: Prey) -> tuple[Hunt, Info]:
        count = problem.room(min(4, state.total - state.random.images))
        random = state.random + judged(problem, prey.random(problem, state, count))
        phase: Phase = "done" if random.images == state.total else "random"
        numbers = {
            "found": float(state.failure is not None),
            "fresh": state.fresh.rate,
            "agreement": state.fresh.agreement,
            "random": random.rate,
            "random agreement": random.agreement,
        }
        after = replace(state, random=random, phase=phase)
        return after, Info(f"{random.images} of {state.total} images of chance", numbers)

    def finished(self, state: Hunt) -> bool:
        return state.phase == "done" or (state.phase == "random" and not self.baseline)

    def best(self, problem: Problem, state: Hunt) -> Candidate | None:
        """The confirmed failure; without one, the image nearest to a failure."""
        return state.failure or problem.best

    def findings(self, state: Hunt) -> dict[str, Tensor]:
        return {} if state.shift is None else {"shift": state.shift.values}


def around(prompt: str) -> str:
    """A template with a free word before the subject, the last noun, and one behind the prompt."""
    names = [name for name in class_names() if prompt.endswith(f" {name}")]
    subject = max(names, key=len, default=prompt.split()[-1])
    return f"{prompt.removesuffix(subject)}{SLOT} {subject} {SLOT}"
