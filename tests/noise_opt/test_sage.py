"""SAGE: planted failures are found and confirmed, absent ones are not; texts on the embedded
model."""

import pytest
import torch

import diffalign as da
from diffalign.noise_opt import SAGE
from diffalign.noise_opt.normality import Normality
from diffalign.noise_opt.sage import around
from diffalign.noise_opt.sage_embedding import bounded
from diffalign.seams.words import tower_of
from diffalign.testing.search import points_of, solve

SIZE = 256


class Planted:
    """Images fail where the mean of every second value is above ``border``; 16 deviations away, of
    normal noise none in 10^50 do."""

    differentiable, name = True, "planted"

    def __init__(self, border, confirmed=True):
        self.border, self.confirmed = border, confirmed

    def height(self, images):
        return points_of(images)[:, ::2].mean(1)

    def __call__(self, images, prompts):
        return self.height(images)

    def fails(self, images, prompts):
        return self.height(images) > self.border

    def confirms(self, images, prompts):
        return self.fails(images, prompts) & self.confirmed


def hunt(plain, border, seed=0, confirmed=True, **options):
    problem = plain(lambda points: points.sum(1), size=SIZE, seed=seed)
    problem.reward = Planted(border, confirmed)
    method = SAGE(**{"iterations": 60, "confirmations": 8, **options})
    state, infos = solve(problem, method)
    return problem, method, state, infos


@pytest.mark.slow
def test_a_planted_region_is_found_sooner_than_by_chance(plain):
    """Three deviations away: chance needs 740 draws on the average; the noise stays normal."""
    border = 2.6 / (SIZE / 2) ** 0.5
    totals, hits = [], 0
    for seed in range(6):
        _, method, state, infos = hunt(plain, border, seed, normality=0.005)
        assert state.failure is not None
        assert Normality.of(state.failure.lineage.noise).normal
        assert method.best(None, state) is state.failure
        totals.append(state.total)
        hits += state.random.confirmed
        assert infos[-1].values["found"] == 1.0
        assert infos[-1].values["fresh"] == state.fresh.rate
        # chance was tried with as many images
        assert state.random.images == state.total
    assert sum(totals) / len(totals) < 1 / 0.0047
    assert hits <= 1


@pytest.mark.slow
def test_no_false_failure_in_twenty_runs(plain):
    for seed in range(20):
        _, _, state, infos = hunt(plain, float("inf"), seed, iterations=5)
        assert state.failure is None
        assert state.random.confirmed == 0
        assert infos[-1].values["found"] == 0.0


@pytest.mark.slow
def test_noise_that_is_not_normal_is_no_failure(plain):
    """A border so far that only noise far from normal reaches it."""
    _, _, state, infos = hunt(plain, 0.9, normality=0.0, rate=0.1)
    assert any("not normal, a new start" in info.text for info in infos)
    assert state.failure is None


def test_nothing_counts_without_the_judge(plain):
    _, _, state, infos = hunt(plain, 0.05, confirmed=False, iterations=20)
    assert any(info.values.get("failure") for info in infos)
    assert state.failure is None


def test_other_rewards_are_refused(plain):
    problem = plain(lambda points: points.sum(1))
    assert "does not say what a failure is" in SAGE().refuses(problem)
    problem.reward = Planted(1.0)
    assert "residual" in SAGE(search="prompt", gradient="residual").refuses(problem)
    assert SAGE().refuses(problem) is None


def test_templates():
    assert around("a photo of a traffic light") == "a photo of a {} traffic light {}"
    assert around("a photo of a zebu") == "a photo of a {} zebu {}"


@pytest.fixture(scope="module")
def pipe():
    return da.load("emoji")


CALL = {"num_inference_steps": 4, "guidance_scale": 3.0}


@pytest.mark.slow
def test_prompts_are_searched_on_the_embedded_model(pipe):
    method = SAGE(search="prompt", rounds=2, seeds=1, candidates=2, beam=2, confirmations=2)
    prompt = "a photo of a bear"
    result = da.align(pipe, prompt, method=method, reward="emoji-failure", **CALL)
    assert "bear" in (result.lineage.prompt or prompt)
    last = result.log[-1]
    assert {"found", "fresh", "random", "agreement"} <= set(last)
    assert 0.0 <= last["random"] <= 1.0
    image = pipe(
        result.lineage.prompt or prompt,
        generator=torch.Generator().manual_seed(result.lineage.moves[0].seed),
        output_type="pt",
        **CALL,
    ).images[0]
    assert torch.equal(image, result.tensor)


@pytest.mark.slow
def test_an_embedding_is_searched_on_the_embedded_model(pipe):
    method = SAGE(search="embedding", iterations=3, seeds=1, confirmations=2, rate=0.05)
    prompt = "a photo of a bear"
    result = da.align(pipe, prompt, method=method, reward="emoji-failure", **CALL)
    scores = [entry["score"] for entry in result.log if "embedding" in entry]
    assert len(scores) == 3
    assert result.lineage.shift is not None
    assert result.findings["shift"].any()
    again = torch.tensor(list(result.replay().tobytes()))
    assert torch.equal(again, torch.tensor(list(result.image.tobytes())))


def test_embeddings_have_norms_of_words(pipe):
    words = tower_of(pipe)
    norms = words.table.norm(dim=1)
    long = bounded(words, torch.full((1, words.table.shape[1]), 9.0))
    assert float(long.norm()) == pytest.approx(float(norms.quantile(0.99)), rel=1e-5)
