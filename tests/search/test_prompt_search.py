"""Prompt search: it finds known words, is not fooled by luck, keeps budgets, loses no fact."""

import math
from dataclasses import dataclass

import pytest
import torch

from diffalign.core import Budget, Meter
from diffalign.core.registry import METHODS, written
from diffalign.search import PromptSearch
from diffalign.search.prompt_pool import Entry, contest, sizes
from diffalign.search.prompt_search import Pool, _annealed
from diffalign.search.wording import loss
from diffalign.testing.mixtures import Chain, Mixture
from diffalign.testing.search import PointProblem, PointReward, solve

PROMPT = "a photo of a red apple and a green clock"
WORDS = ("sharp focus", "a picture of", "that is red")


def hits(prompt):
    """How many of the words that help are in a prompt."""
    return sum(word in prompt for word in WORDS)


def first(points):
    return points[:, 0]


def by_words(text):
    """Images whose value is the number of good words, give or take 0.5."""
    return Mixture.of([[float(hits(text))]], 0.5)


def alike(text):
    return Mixture.of([[0.0]], 1.0)


@dataclass(slots=True)
class Lucky(PointProblem):
    """A generator that ignores its prompt, whose noise differs from prompt to prompt all the
    same."""

    def start(self, seeds, noise=None):
        text = self.prompt if self.text is None else self.text
        shift = 0 if text == self.prompt else 1 + sum(text.encode())
        return PointProblem.start(self, [seed + shift for seed in seeds], noise)


def make(model=by_words, cls=PointProblem, seed=0, steps=2, reserve=0, **limits):
    meter = Meter(Budget(**limits))
    chain = Chain.of_steps(steps, 0.0)
    return cls(model, chain, PointReward(first), PROMPT, seed, meter, reserve)


STRATEGIES = ("evolve", "climb", "anneal", "genetic", "random")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_strategy_finds_something(strategy):
    problem = make()
    state, infos = solve(problem, PromptSearch(strategy=strategy, rounds=6, children=6))
    assert state.winner is not None
    assert state.rounds == 6
    assert hits(state.winner) >= 1, [info.text for info in infos]
    assert state.gain > 0
    assert loss(PROMPT, state.winner) is None


def found(strategy, nfe, seed):
    """True quality of what a search finds with a budget of evaluations."""
    problem = make(seed=seed, nfe=nfe)
    method = PromptSearch(strategy=strategy, rounds=None, children=6, final=2)
    state, _ = solve(problem, method)
    assert problem.meter.rows <= nfe
    return hits(state.winner)


@pytest.mark.slow
def test_feedback_needs_fewer_images_than_random_rewording():
    """Quality of the found prompt, 20 seeds, paired: evolution with 200 evaluations is above random
    rewording with 400, by over 3 standard errors."""
    evolved = torch.tensor([float(found("evolve", 200, seed)) for seed in range(20)])
    reworded = torch.tensor([float(found("random", 400, seed)) for seed in range(20)])
    difference = evolved - reworded
    assert difference.mean() > 3 * difference.std() / math.sqrt(20)


@pytest.mark.slow
def test_luck_is_no_gain():
    """A generator that ignores its prompt: the best of many noisy means is above the original, the
    reported gain on fresh noises is not; 20 seeds, 3 standard errors."""
    biased, fresh = [], []
    for seed in range(20):
        problem = make(alike, Lucky, seed=seed)
        method = PromptSearch(rounds=4, children=6, final=4)
        state, _ = solve(problem, method)
        original = next(entry for entry in state.entries if entry.prompt == PROMPT)
        biased.append(state.entries[0].mean - original.mean)
        fresh.append(state.gain)
    for values, above in ((biased, True), (fresh, False)):
        t = torch.tensor(values)
        assert (float(t.mean()) > 3 * float(t.std()) / math.sqrt(20)) is above


def test_prompts_are_compared_on_the_same_noises():
    """Where the prompt changes nothing, equal noises give equal scores and no other prompt."""
    problem = make(alike)
    state, infos = solve(problem, PromptSearch(rounds=2))
    assert (state.winner, state.gain) == (PROMPT, 0.0)
    assert all(len({entry.scores[0] for entry in state.entries}) == 1 for _ in infos)


def test_images_are_scored_against_the_original_and_the_best_says_its_prompt():
    prompts = []

    class Reward:
        differentiable = False
        function = None

        def __call__(self, images, texts):
            prompts.extend(texts)
            return images[:, 0, 0, 0]

    problem = make()
    problem.reward = Reward()
    solve(problem, PromptSearch(rounds=4, children=6))
    assert set(prompts) == {PROMPT}
    text = problem.best.lineage.prompt
    assert hits(text) >= 1
    # the image of the result, made again from its prompt and seed
    variant = problem.variant(prompt=text)
    image = variant.finish(variant.run(variant.start([problem.best.lineage.moves[0].seed])), [None])
    assert torch.equal(image[0].image, problem.best.image)


def test_cost_by_hand():
    """draws for the original; rounds of 1 + 4, then of 3 or 4 + 4 prompts; 2 x final."""
    problem = make()
    method = PromptSearch(rounds=2, children=4, keep=3, draws=2, final=3, halving=False)
    _, infos = solve(problem, method)
    sizes_ = [int(info.values["prompts"]) for info in infos[1:3]]
    assert sizes_[0] == 5
    assert sizes_[1] in (7, 8)
    images = 2 + 2 * sum(sizes_) + 2 * 3
    assert problem.meter.rewards == problem.meter.decodes == images
    assert problem.meter.rows == 2 * images


def test_halving_by_hand():
    """The original and the better half of the others are drawn again."""
    assert sizes(8, 3, halving=True) == [8, 5, 3]
    assert sizes(8, 3, halving=False) == [8, 8, 8]
    assert sizes(1, 4, halving=True) == [1, 1, 1, 1]
    problem = make()
    prompts = [
        PROMPT,
        *(f"{PROMPT}{word}" for word in ("", ", x", ", sharp focus", " that is red")),
    ]
    prompts = list(dict.fromkeys(prompts))
    entries = contest(problem, prompts, 3, halving=True)
    assert problem.meter.rewards == sum(sizes(4, 3, halving=True)) == 4 + 3 + 2
    draws = {entry.prompt: len(entry.scores) for entry in entries}
    assert draws[PROMPT] == 3
    assert draws[f"{PROMPT}, x"] == 1
    assert [entry.rank for entry in entries] == sorted((e.rank for e in entries), reverse=True)


def test_wordings_that_lose_a_fact_are_dropped():
    questions = []

    def rewriter(original, best, worst, count):
        questions.append((best, worst, count))
        return [
            "a photo of a red apple",
            "a photo of a green apple and a red clock",
            "a picture of a red apple and a green clock",
            PROMPT,
        ]

    problem = make()
    state, infos = solve(problem, PromptSearch(rewriter=rewriter, rounds=3, children=3))
    assert state.known == (PROMPT, "a picture of a red apple and a green clock")
    # it was asked twice for more, and the second round found nothing new
    assert [count for _, _, count in questions] == [3, 6, 6 + 1, 3, 6, 6 + 2]
    assert infos[1].values["prompts"] == 2
    assert state.rounds == 1
    assert state.winner == "a picture of a red apple and a green clock"


def test_the_rewriter_is_told_what_worked_and_what_did_not():
    told = []

    def rewriter(original, best, worst, count):
        told.append((best, worst))
        number = len(told)
        return [f"{PROMPT}, sharp focus, version {number}", f"{PROMPT}, version {number}"]

    method = PromptSearch(rewriter=rewriter, rounds=3, children=2, keep=1, draws=4, halving=False)
    solve(make(), method)
    (best, worst) = told[1]
    assert [text for text, _ in best] == [f"{PROMPT}, sharp focus, version 1"]
    assert {text for text, _ in worst} <= {PROMPT, f"{PROMPT}, version 1"}
    assert best[0][1] > max(score for _, score in worst)


def test_climbing_goes_on_from_one_prompt():
    problem = make()
    method = PromptSearch(strategy="climb", rounds=4, children=4)
    state = method.init(problem)
    for _ in range(4):
        state, _ = method.step(problem, state)
        assert len(state.parents) == 1


@pytest.mark.parametrize(
    ("difference", "temperature", "uniform", "moves"),
    [
        (0.1, 0.0, 0.99, True),
        (-0.1, 0.0, 0.0, False),
        (-0.1, 0.1, math.exp(-1) - 0.01, True),
        (-0.1, 0.1, math.exp(-1) + 0.01, False),
    ],
)
def test_annealing_by_hand(difference, temperature, uniform, moves):
    state = Pool(parents=("now",))
    entries = [Entry("new", (1.0 + difference, 2.0 + difference)), Entry("now", (1.0, 2.0))]
    entries.append(Entry("original", (9.0, 9.0)))
    assert _annealed(state, "original", entries, temperature, uniform) == (
        "new" if moves else "now"
    )


def test_annealing_ends_cold():
    """In the last round the temperature is 0: the current prompt is never left for a worse one."""
    problem = make()
    method = PromptSearch(strategy="anneal", rounds=3, heat=1e9, children=2)
    state = method.init(problem)
    for _ in range(3):
        state, _ = method.step(problem, state)
    before = state
    state, _ = method.step(problem, before)
    (now,) = (e for e in state.entries if e.prompt == before.parents[0])
    chosen = next(e for e in state.entries if e.prompt == state.parents[0])
    assert chosen.scores[0] >= now.scores[0] or len(chosen.scores) > 1


def test_annealing_keeps_the_best_in_the_pool():
    """A step downhill, taken for certain at a huge temperature, does not lose the best wording."""
    good = f"{PROMPT}, sharp focus"
    answers = iter([good, f"{PROMPT}, x", f"{PROMPT}, y", f"{PROMPT}, z"])

    def rewriter(original, best, worst, count):
        return [next(answers)]

    options = {"strategy": "anneal", "heat": 1e30, "children": 1, "rounds": 4}
    method = PromptSearch(rewriter=rewriter, draws=4, halving=False, **options)
    problem = make(model=lambda text: Mixture.of([[float(hits(text))]], 1e-6))
    state, infos = solve(problem, method)
    assert state.winner == good
    assert state.parents != (good,)
    assert [int(info.values["prompts"]) for info in infos[1:5]] == [2, 3, 4, 4]
    with pytest.raises(ValueError, match=r"draws=1\) must be at least 2"):
        PromptSearch(strategy="anneal", draws=1)


def test_crossing_keeps_every_fact():
    problem = make()
    method = PromptSearch(strategy="genetic", rounds=5, children=6)
    state, _ = solve(problem, method)
    assert len(state.known) > 10
    assert all(loss(PROMPT, text) is None for text in state.known)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("nfe", [2, 8, 31, 77])
def test_budgets_are_kept(strategy, nfe):
    problem = make(nfe=nfe)
    solve(problem, PromptSearch(strategy=strategy, rounds=None))
    assert problem.meter.rows <= nfe
    assert problem.best is not None


def test_the_comparison_keeps_its_share_of_the_budget():
    problem = make(nfe=100)
    state, _ = solve(problem, PromptSearch(rounds=None, final=4))
    assert state.winner is not None
    assert state.gain != 0.0


@pytest.mark.parametrize(("images", "prompts"), [(18, 5), (15, 4), (9, 3), (5, 2)])
def test_a_small_budget_shrinks_the_first_round(images, prompts):
    """18 images hold 2 + (5 + 3) + 2 x 4; with less, wordings are tried and compared all the
    same."""
    problem = make(nfe=2 * (images + 1), reserve=1)
    state, infos = solve(problem, PromptSearch())
    assert state.rounds == 1
    assert infos[1].values["prompts"] == prompts
    assert problem.meter.rewards <= images
    if state.best != PROMPT:
        assert state.gain != 0.0
        assert problem.meter.rewards >= images - 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equal_seeds_give_equal_prompts(strategy):
    runs = []
    for seed in (1, 1, 2):
        problem = make(seed=seed)
        state, _ = solve(problem, PromptSearch(strategy=strategy, rounds=4))
        runs.append((state.known, state.winner, problem.best.score))
    assert runs[0] == runs[1] != runs[2]


def test_text_and_configuration():
    (method,) = METHODS.make("prompt-search:strategy=climb,rounds=none")
    assert (method.strategy, method.rounds, method.ends) == ("climb", None, False)
    assert METHODS.from_config(METHODS.to_config(method)) == method

    def mine(original, best, worst, count):
        return []

    config = METHODS.to_config(PromptSearch(rewriter=mine))
    assert config["rewriter"] == "function"
    with pytest.raises(ValueError, match="rewriter"):
        written(METHODS, PromptSearch(rewriter=mine))


@pytest.mark.parametrize("answer", [None, "a red apple", [1, 2], 5], ids=str)
def test_a_rewriter_that_returns_no_texts(answer):
    method = PromptSearch(rewriter=lambda original, best, worst, count: answer)
    with pytest.raises(TypeError, match=r"rewriter=\.\.\.\) must return a list of texts; got"):
        solve(make(), method)


def test_a_rewriter_that_is_none():
    with pytest.raises(TypeError, match="rewriter"):
        PromptSearch(rewriter=3)
