"""Particles: unbiased evidence, potentials that multiply to the tilt, everything permuted."""

import math

import pytest
import torch

from diffalign.core import Budget, Meter
from diffalign.search import SMC, smc
from diffalign.search import particles as module
from diffalign.testing.mixtures import Chain, Exact, Mixture, binned, total_variation
from diffalign.testing.search import PointProblem, replay, solve, toy

TWO = Mixture.of([[-2.0], [1.5]], [0.4, 0.3], [0.7, 0.3])
CHAIN = Chain.of_steps(6)


def reward(x):
    return 1.5 * torch.tanh(x[:, 0])


EXACT = Exact(TWO, CHAIN, reward, tilt=1.0)
WAYS = {
    "diff": {},
    "diff, at every step": {"every": 1, "resampling": "stratified"},
    "diff, always": {"every": 2, "threshold": 1.0, "resampling": "multinomial"},
    "max": {"potential": "max", "every": 2},
    "sum": {"potential": "sum", "every": 2, "tilt": 0.5},
    "tds": {"preset": "tds", "tilt": 0.5},
    "das": {"preset": "das", "tilt": 0.5},
}


def one_pass(populations, count=8, seed=0, chain=CHAIN, function=reward, **options):
    """A pass of many independent populations: the problem, the method and its state."""
    method = SMC(particles=count, populations=populations, **options)
    problem = toy(TWO, function, chain=chain, seed=seed)
    state = method.init(problem)
    while not state.scores:
        state, _ = method.step(problem, state)
    return problem, method, state


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def evidence(state, populations):
    """Estimates of Z, one of each population."""
    return doubles(state.log_weights).view(populations, -1).exp().mean(1)


def check_evidence(state, populations, tilt, errors=5.0):
    exact = math.exp(Exact(TWO, CHAIN, reward, tilt).log_evidence)
    z = evidence(state, populations)
    assert abs(float(z.mean()) - exact) < errors * float(z.std()) / populations**0.5


@pytest.mark.parametrize("way", WAYS)
def test_evidence_is_unbiased(way):
    """80 populations of 8, 5 standard errors."""
    _, _, state = one_pass(80, **WAYS[way])
    check_evidence(state, 80, WAYS[way].get("tilt", 1.0))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_evidence_is_unbiased_over_two_thousand_populations(way):
    _, _, state = one_pass(2000, seed=1, **WAYS[way])
    check_evidence(state, 2000, WAYS[way].get("tilt", 1.0), errors=4.0)


@pytest.mark.slow
def test_dropped_weights_are_noticed(monkeypatch):
    """Negative control: weights thrown away where nothing is resampled, as the published code
    does, shift the evidence by far more than the bound above."""
    draw = smc.resampled

    def forgetful(problem, particles, *options):
        after = draw(problem, particles, *options)
        if after is particles:
            return module.replace(particles, log_weights=torch.zeros_like(particles.log_weights))
        return after

    monkeypatch.setattr(smc, "resampled", forgetful)
    _, _, state = one_pass(600)
    with pytest.raises(AssertionError):
        check_evidence(state, 600, 1.0)


@pytest.mark.slow
def test_scores_that_are_not_permuted_are_noticed(monkeypatch):
    """Negative control: the last scores stay in place while particles move."""
    permute = module.Particles.permuted

    def careless(self, indices, chosen, seeds):
        after = permute(self, indices, chosen, seeds)
        return module.replace(after, paid=self.paid, level=self.level)

    monkeypatch.setattr(module.Particles, "permuted", careless)
    _, _, state = one_pass(600, every=2, threshold=1.0)
    with pytest.raises(AssertionError):
        check_evidence(state, 600, 1.0)


def test_gradients_that_are_not_permuted_are_noticed(monkeypatch):
    """Negative control: a particle that moves by another one's gradient still has right weights,
    since they correct any drift; but it is no longer guided, so the weights scatter more."""
    permute = module.Particles.permuted

    def careless(self, indices, chosen, seeds):
        return module.replace(permute(self, indices, chosen, seeds), gradient=self.gradient)

    options = {"preset": "tds", "threshold": 1.0, "tilt": 2.0}
    _, _, state = one_pass(150, seed=3, **options)
    right = float(doubles(state.log_weights).var())
    monkeypatch.setattr(module.Particles, "permuted", careless)
    _, _, state = one_pass(150, seed=3, **options)
    assert float(doubles(state.log_weights).var()) > 1.2 * right


@pytest.mark.parametrize("way", [way for way in WAYS if "preset" not in WAYS[way]])
def test_potentials_multiply_to_the_tilt(way):
    """Along each lineage the potentials, the last one included, are exp(tilt * score)."""
    options = WAYS[way]
    problem = toy(TWO, reward, chain=CHAIN)
    method = SMC(particles=6, **options)
    state, before = method.init(problem), None
    while not state.scores:
        before = state.particles
        state, _ = method.step(problem, state)
    tilt = options.get("tilt", 1.0)
    weights = doubles(state.log_weights) - before.log_evidence
    product = before.paid[0] + (weights - before.log_weights[0])
    assert torch.allclose(product, tilt * doubles(state.scores), atol=1e-6)


def slow_diff(problem, method, seeds):
    """FK steering with "diff" in plain float64 loops, without resampling: log weights."""
    chain, sampler = problem.sampler.chain, problem.sampler
    total = []
    for seed in seeds:
        state, last, weight = sampler.start([seed]), 0.0, 0.0
        for step in range(chain.count):
            state = sampler.run(state, step + 1)
            value = float(reward(state.x0 if step + 1 < chain.count else state.latents))
            weight += method.tilt * (value - last)
            last = value
        total.append(weight)
    return total


def test_weights_are_those_of_a_slow_loop():
    """Without resampling every particle's weight is a running sum that telescopes."""
    _, method, state = one_pass(1, 5, every=1, threshold=0.0)
    problem = toy(TWO, reward, chain=CHAIN)
    assert torch.allclose(
        doubles(state.log_weights),
        doubles(slow_diff(problem, method, problem.seeds(5))),
        atol=1e-9,
    )
    assert torch.allclose(doubles(state.log_weights), doubles(state.scores), atol=1e-9)


def slow_tds(seeds, tilt, temper):
    """A guided particle in plain float64, without resampling, from the card's formulas."""
    problem = toy(TWO, reward, chain=CHAIN)
    sampler, total = problem.sampler, []
    for seed in seeds:
        state = sampler.start([seed])
        value, gradient = problem.twist(state)
        weight = tilt * temper(0) * float(value)
        for step in range(CHAIN.count):
            std = CHAIN.std(step)
            mean = CHAIN.mean(state.latents, CHAIN.predict(TWO, state.latents, step), step)
            drift = std**2 * tilt * temper(step + 1) * gradient
            last = tilt * temper(step) * float(value)
            state = sampler.run(state, step + 1, drift)
            if std > 0:
                z = float(((state.latents - mean - drift) / std).squeeze())
                d = float(drift.squeeze()) / std
                weight += -0.5 * (z + d) ** 2 + 0.5 * z**2
            if state.finished:
                weight += tilt * float(reward(state.latents)) - last
            else:
                value, gradient = problem.twist(state)
                weight += tilt * temper(step + 1) * float(value) - last
        total.append(weight)
    return total


@pytest.mark.parametrize("preset", ["tds", "das"])
def test_guided_weights_are_those_of_a_slow_loop(preset):
    _, method, state = one_pass(1, 4, preset=preset, threshold=0.0, tilt=0.7)
    problem = toy(TWO, reward, chain=CHAIN)
    slow = slow_tds(
        problem.seeds(4), 0.7, lambda step: method.steering(6).temper(step, CHAIN.count)
    )
    assert torch.allclose(doubles(state.log_weights), doubles(slow), atol=1e-9)


def test_tempering_by_hand():
    das = SMC(preset="das").steering(100)
    assert das.temper(0, 100) == 0.0
    assert das.temper(10, 100) == pytest.approx(1.008**10 - 1)
    assert das.temper(86, 100) < 1.0 == das.temper(88, 100)
    assert das.temper(5, 50) == pytest.approx(1.008**10 - 1)  # percent, not steps
    assert das.temper(6, 6) == 1.0
    assert SMC(preset="tds").steering(100).temper(0, 100) == 1.0


def test_das_that_lets_the_score_in_at_once_is_tds():
    """The first weights differ, since das starts from nothing; it catches up at the next step."""
    _, _, tds = one_pass(1, 6, preset="tds", threshold=0.0)
    _, _, das = one_pass(1, 6, preset="das", tempering=1.0, threshold=0.0)
    assert tds.scores == das.scores
    assert das.log_weights == pytest.approx(tds.log_weights, abs=1e-9)


def flat(x):
    """The reward, with no slope anywhere."""
    return reward(x.detach()) + 0.0 * x[:, 0]


def test_tds_without_slope_is_fk_with_the_next_prediction():
    """The twist reads the prediction of the state itself; FK reads the one that led to it."""
    _, _, state = one_pass(1, 5, preset="tds", function=flat, threshold=0.0)
    problem = toy(TWO, reward, chain=CHAIN)
    plain = problem.run(problem.start(problem.seeds(5))).latents
    assert torch.equal(state.endings[0].latents, plain)
    assert torch.allclose(doubles(state.log_weights), doubles(state.scores), atol=1e-9)


@pytest.mark.slow
def test_law_approaches_the_tilted_one_with_particles():
    """Total variation of one population, mean of 12, falls about as one over the root of K."""
    edges = torch.linspace(-3, 3, 13, dtype=torch.float64)
    target, errors = EXACT.bins(edges), []
    for count in (32, 128, 512):
        distances = []
        for seed in range(12):
            _, method, state = one_pass(1, count, seed=seed)
            x = state.endings[0].latents[:, 0]
            shares = method.weighted(state).shares
            distances.append(total_variation(binned(x, shares, edges), target))
        errors.append(sum(distances) / 12)
    slope = math.log(errors[2] / errors[0]) / math.log(512 / 32)
    assert -0.75 < slope < -0.3, errors


def test_one_particle_is_the_plain_sampler():
    problem, _, state = one_pass(1, 1)
    other = toy(TWO, reward, chain=CHAIN)
    plain = other.run(other.start(other.seeds(1))).latents
    assert torch.equal(state.endings[0].latents, plain)
    assert state.log_weights == pytest.approx(state.scores)
    assert problem.meter.rows == CHAIN.count


def test_cost_is_that_of_the_card():
    problem, _, _ = one_pass(1, 8, every=2)
    assert problem.meter.rows == 8 * 6
    assert problem.meter.decodes == problem.meter.rewards == 8 * 3  # at 2, at 4 and at the end
    problem, _, _ = one_pass(1, 8, preset="tds")
    assert problem.meter.rows == 2 * 8 * 6
    assert problem.meter.backward == 8 * 6
    assert problem.meter.rewards == 8 * 7


@pytest.mark.parametrize("options", [{}, {"preset": "tds"}, {"every": 1, "populations": 3}])
@pytest.mark.parametrize("nfe", [6, 13, 100, 250])
def test_budget_is_kept_and_used(options, nfe):
    meter = Meter(Budget(nfe=nfe))
    problem = toy(TWO, reward, chain=CHAIN, budget=meter)
    state, _ = solve(problem, SMC(particles=4, **options))
    price = 6 if "preset" not in options else 12
    assert meter.rows <= nfe
    assert len(state.scores) == nfe // price or meter.rows > nfe - price


def test_same_seed_same_passes_and_step_changes_nothing():
    first, second = (one_pass(2, 4, every=1, seed=5)[2] for _ in range(2))
    assert first.scores == second.scores
    assert first.log_weights == second.log_weights
    problem, method, state = one_pass(1, 4, every=1)
    state, _ = method.step(problem, state)
    kept = state.particles
    latents, weights = kept.state.latents.clone(), kept.log_weights.clone()
    method.step(problem, state)
    assert torch.equal(state.particles.state.latents, latents)
    assert torch.equal(state.particles.log_weights, weights)


@pytest.mark.parametrize("options", [{"every": 1}, {"preset": "tds"}, {"preset": "das"}], ids=str)
def test_lineages_lead_to_the_images(options, monkeypatch):
    """The moves and drifts of every particle repeat its image, through every resampling."""
    lineages, finish = [], PointProblem.finish

    def seen(problem, state, known):
        lineages.extend(known)
        return finish(problem, state, known)

    monkeypatch.setattr(PointProblem, "finish", seen)
    problem, _, state = one_pass(1, 6, threshold=1.0, tilt=3.0, **options)
    for row, lineage in enumerate(lineages):
        assert torch.equal(replay(problem, lineage), state.endings[0].latents[row])
        steps = [step for step, _ in lineage.drifts]
        assert steps == (list(range(5)) if "preset" in options else [])
    assert len(lineages) == 6
    assert len({lineage.moves[0].seed for lineage in lineages}) < 6
    assert problem.best.score == max(state.scores)


def test_an_image_of_drifts_has_no_seed_that_alone_makes_it():
    problem, _, _ = one_pass(1, 2, preset="tds", threshold=0.0)
    assert len(problem.best.lineage.moves) == 1
    assert problem.best.lineage.seed is None


def test_samples_follow_the_weights():
    problem, method, state = one_pass(1, 16)
    images = method.samples(problem, state, 500)
    assert images.shape == (500, 3, 1, 1)
    from diffalign.testing.search import points_of

    mean = float(reward(points_of(images)).mean())
    weighted = method.weighted(state)
    spread = float((weighted.shares * (weighted.scores - weighted.mean()) ** 2).sum()) ** 0.5
    assert mean == pytest.approx(weighted.mean(), abs=5 * spread / 500**0.5 + 1e-9)


def test_bad_input():
    plain = toy(TWO, reward, chain=Chain.of_steps(6, eta=0.0))
    with pytest.raises(ValueError, match="eta above 0"):
        solve(plain, SMC())
    blind = toy(TWO, reward, chain=6, differentiable=False)
    with pytest.raises(ValueError, match="preset das needs a reward with gradient"):
        solve(blind, SMC(preset="das"))
    blind.reward = lambda images, prompts: images.mean((1, 2, 3))
    with pytest.raises(ValueError, match="preset tds needs a reward with gradient"):
        solve(blind, SMC(preset="tds"))
    with pytest.raises(ValueError, match=r"potential='max'\) is for preset='fk'"):
        SMC(preset="tds", potential="max")
    with pytest.raises(ValueError, match="every"):
        SMC(preset="tds", every=2)
    with pytest.raises(ValueError, match="threshold"):
        SMC(threshold=1.5)
    with pytest.raises(ValueError, match="finite scores"):
        solve(toy(TWO, lambda x: x[:, 0] * math.nan, chain=6), SMC())
