"""CARINOX: each part clipped on its own, as published and as released; several starts."""

import pytest
import torch

from diffalign.core import Ascent
from diffalign.noise_opt import CARINOX, RandomSearch, ReNO
from diffalign.noise_opt.loop import Climb
from diffalign.testing.search import solve


def along(axis, length):
    """A linear part whose gradient has this length."""
    return lambda points: length * points[:, axis]


class Parts:
    """A problem that answers with two given gradients."""

    def __init__(self, gradients, weights):
        self.gradients, self.weights = gradients, weights
        self.sampler = type("Sampler", (), {"count": 1})()

    def ascend(self, noise, seeds, **options):
        assert options["parts"]
        ones = torch.ones(len(self.gradients), 1, dtype=torch.float64)
        return Ascent(ones.sum(0), ones, self.weights, self.gradients, ones, ())


NOISE = torch.full((1, 16), 0.5)


def total(gradients, weights, **options):
    rows = torch.zeros(len(gradients), 1, 16)
    for number, length in enumerate(gradients):
        rows[number, 0, number] = length
    method = CARINOX(regulariser=0.0, **options)
    return method.look(Parts(rows, weights), Climb(NOISE), NOISE).gradient[0]


def test_parts_of_norm_100_and_a_hundredth_are_clipped_alone():
    """Norms .1 and .01 after the clip of .1; with weights 1 and 3 the sum is (.1, .03)."""
    assert total((100.0, 0.01), (1.0, 3.0))[:2].tolist() == pytest.approx([0.1, 0.03])


def test_the_released_code_weighs_before_it_clips_and_clips_the_sum():
    """Weights cancel where the clip acts: (.1, .03) before the second clip of .1."""
    short = total((100.0, 0.01), (5.0, 3.0), variant="released")
    length = (0.1**2 + 0.03**2) ** 0.5
    assert short[:2].tolist() == pytest.approx([0.1 * 0.1 / length, 0.03 * 0.1 / length])


def test_without_a_clip_at_work_both_go_the_same_way():
    small = (0.02, 0.01)
    paper, released = (total(small, (1.0, 1.0), variant=v) for v in ("paper", "released"))
    torch.testing.assert_close(paper, released)
    # above the limit of the sum, the direction is still the same
    paper, released = (total((0.09, 0.08), (1.0, 1.0), variant=v) for v in ("paper", "released"))
    assert not torch.allclose(paper, released)
    torch.testing.assert_close(paper / paper.norm(), released / released.norm())


def test_the_regulariser_is_in_every_part():
    method = CARINOX(clip=None, regulariser=2.0)
    rows = torch.zeros(3, 1, 16)
    slope = method.look(Parts(rows, (1.0, 1.0, 1.0)), Climb(NOISE), NOISE)
    # (d - 1) / r - r along the noise, for r = 2 and d = 16
    expected = 3 * 2.0 * (15 / 2.0 - 2.0) * NOISE / 2.0
    torch.testing.assert_close(slope.gradient, expected)


def tiles(points):
    """Many hills of unequal height: where an ascent ends depends on where it begins."""
    return (torch.cos(2.5 * points[:, :2]) + 0.35 * points[:, :2].tanh()).sum(1)


def best(method, plain, seed):
    problem = plain([(1.0, tiles)], seed=seed)
    solve(problem, method)
    return problem.best.score, problem.meter.backward


@pytest.mark.slow
def test_several_starts_beat_one_long_ascent_and_random_search(plain):
    """Mean over 20 seeds at the same number of images, by three standard errors."""
    options = {"rate": 0.5, "clip": 0.3, "regulariser": 0.0}
    scores = {"many": [], "one": [], "random": []}
    for seed in range(20):
        many, spent = best(CARINOX(starts=6, iterations=8, **options), plain, seed)
        one, other = best(CARINOX(starts=1, iterations=48, **options), plain, seed)
        assert spent <= other
        scores["many"].append(many)
        scores["one"].append(one)
        scores["random"].append(best(RandomSearch(noises=48), plain, seed)[0])
    values = {name: torch.tensor(row) for name, row in scores.items()}
    for name in ("one", "random"):
        gain = values["many"] - values[name]
        error = gain.std() / len(gain) ** 0.5
        assert gain.mean() > 3 * error, name


def test_the_first_start_is_renos(plain):
    """One part, one start, the same numbers."""
    options = {"iterations": 5, "rate": 0.1}
    problem, other = plain([(1.0, tiles)]), plain(tiles)
    _, ours = solve(problem, CARINOX(starts=1, **options))
    _, theirs = solve(other, ReNO(**options))
    assert [i.values["score"] for i in ours] == [i.values["score"] for i in theirs]
    assert torch.equal(problem.best.lineage.noise, other.best.lineage.noise)


def test_what_it_costs(plain):
    problem = plain([(1.0, along(0, 1.0)), (2.0, along(1, 1.0))])
    _, infos = solve(problem, CARINOX(starts=3, iterations=4))
    assert len(infos) == 12
    assert problem.meter.rows == problem.meter.decodes == 12
    # a backward pass for each part, none for the last image of a start
    assert problem.meter.backward == 3 * 3 * 2
    assert infos[-1].text == "start 3 of 3, iteration 4 of 4"


def test_the_released_choice_is_by_unweighted_parts(plain):
    """The parts pull in opposite directions: the weighted sum falls while the plain sum rises."""
    parts = [(3.0, along(0, -1.0)), (1.0, along(0, 2.0))]
    problem = plain(parts)
    method = CARINOX(starts=1, iterations=6, variant="released", clip=None, regulariser=0.0)
    state, infos = solve(problem, method)
    sums = [info.values["unweighted"] for info in infos]
    choice = method.best(problem, state)
    assert state.value == max(sums)
    assert choice.score == pytest.approx(infos[sums.index(max(sums))].values["score"])
    assert choice.score <= problem.best.score
    assert CARINOX().best(problem, state) is problem.best


def test_processes_share_the_starts(plain):
    problem = plain([(1.0, tiles)])
    problem.processes = 2
    solve(problem, CARINOX(starts=3, iterations=2))
    assert problem.meter.rows == 2 * 2
