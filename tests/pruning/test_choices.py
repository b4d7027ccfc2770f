"""Which tokens are chosen: numbers by hand, slow plain versions, and the promised bounds."""

import math

import pytest
import torch

from diffalign.core import StepInfo
from diffalign.pruning import CAT, choices
from diffalign.pruning.regions import regions, tiles

CPU = torch.device("cpu")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_largest_by_hand():
    values = torch.tensor([[3.0, 1.0, 4.0, 1.0, 5.0], [2.0, 2.0, 2.0, 0.0, 2.0]])
    assert choices.largest(values, 2).tolist() == [[2, 4], [0, 1]]


def test_the_stalest_by_hand():
    """Of five tokens in steps of three: 0, 3, 1, 4, 2."""
    assert choices.spread(5).tolist() == [0, 3, 1, 4, 2]
    visits = torch.tensor([[0.5, 0.0, 1.0, 0.0, 0.0]])
    assert choices.with_stalest(visits, torch.tensor([[4]]), 2).tolist() == [[3, 4]]
    assert choices.with_stalest(visits, torch.tensor([[2, 4]]), 4).tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("count", [1, 2, 7, 64, 1000])
def test_spread_names_every_token_once(count):
    order = choices.spread(count)
    assert sorted(order.tolist()) == list(range(count))
    assert choices.turns(count)[order].tolist() == list(range(count))


def test_integers_in_the_order_of_numbers():
    values = torch.tensor([-torch.inf, -2.5, -1e-40, -0.0, 0.0, 1e-40, 1.0, 1.0, torch.inf])
    integers = choices.ordered(values)
    signs = values.sign()[3:5].tolist()
    assert signs == [0.0, 0.0]
    assert integers.diff().sign().tolist() == [1, 1, 1, 0, 1, 1, 0, 1]


def by_region_slowly(delta, labels, quotas, count):
    """One image: the procedure of the paper, token by token."""
    norm = [float(x.norm()) for x in delta]
    members = {}
    for token, label in enumerate(labels.tolist()):
        members.setdefault(label, []).append(token)
    moves = {c: float(delta[torch.tensor(t)].amax(0).norm()) for c, t in members.items()}
    picked, rest = [], []
    for turn, label in enumerate(sorted(members, key=lambda c: (-moves[c], c))):
        ordered = sorted(members[label], key=lambda t: (-norm[t], t))
        picked += ordered[: quotas[turn]]
        rest += ordered[quotas[turn] :]
    return (picked + rest)[:count]


@pytest.mark.parametrize("count", [3, 20, 60])
def test_by_region_is_the_procedure(count):
    delta, quotas = draw(3, 60, 4), torch.tensor([6, 4, 2, 2, 2, 2])
    labels = torch.randint(0, 5, (3, 60), generator=torch.Generator().manual_seed(1))  # 5 is empty
    fast = choices.by_region(delta, labels, quotas, count)
    slow = [by_region_slowly(d, x, quotas.tolist(), count) for d, x in zip(delta, labels)]
    assert fast.tolist() == [sorted(tokens) for tokens in slow]


def test_names_of_regions_do_not_matter():
    delta, quotas = draw(1, 60, 4), torch.full((6,), 3)
    labels = torch.randint(0, 6, (1, 60), generator=torch.Generator().manual_seed(1))
    other = torch.tensor([3, 5, 0, 1, 4, 2])[labels]
    first, second = (choices.by_region(delta, x, quotas, 25) for x in (labels, other))
    assert torch.equal(first, second)


def test_the_metric_of_ras_by_hand():
    """Deviations 1, 2 and 3 times exp(0.1 drops); with 12 drops the first is exp(1.2) = 3.32."""
    prediction = torch.tensor([[[1.0, -1.0], [2.0, -2.0], [3.0, -3.0]]]) / math.sqrt(2)
    none, many = torch.zeros(1, 3), torch.tensor([[12.0, 0.0, 0.0]])
    assert choices.starving(prediction, none, 1).tolist() == [[2]]
    assert choices.starving(prediction, many, 1).tolist() == [[0]]


def test_tiles_are_nearly_square_and_cover_the_image():
    assert tiles((1, 4, 4), 4).tolist() == [[0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75]]
    wide = tiles((1, 2, 32), 8)
    assert (len(set(wide[:, 0].tolist())), len(set(wide[:, 1].tolist()))) == (1, 8)
    assert len(tiles((1, 2, 2), 20)) <= 4


def test_regions_are_places_of_an_image_and_follow_what_is_in_them():
    grid, count = (1, 16, 16), 4
    flat = regions(torch.zeros(1, 256, 8), grid, count)[0].reshape(16, 16)
    for rows, columns in ((slice(0, 8), slice(0, 8)), (slice(8, 16), slice(8, 16))):
        assert len(set(flat[rows, columns].flatten().tolist())) == 1
    assert len(set(flat.flatten().tolist())) == count
    # an edge a little left of the middle, of a size that outweighs the places
    image = torch.zeros(1, 16, 16, 8)
    image[:, :, 7:] = 20.0
    moved = regions(image.reshape(1, 256, 8), grid, count)[0].reshape(16, 16)
    assert not set(moved[:, :7].flatten().tolist()) & set(moved[:, 7:].flatten().tolist())


def test_images_have_regions_of_their_own():
    prediction = draw(2, 256, 8)
    both = regions(prediction, (1, 16, 16), 20)
    assert torch.equal(both[1:], regions(prediction[1:], (1, 16, 16), 20))


def history(technique, steps=20, grid=(1, 12, 12), batch=2, width=8):
    """The sets of a run on predictions that drift, one region much faster than the others."""
    tokens = grid[1] * grid[2]
    speed = torch.ones(tokens)
    speed[: tokens // 6] = 30.0
    path = draw(steps, batch, tokens, width).cumsum(0) * speed[:, None]
    state, sets, latest = technique.init(batch), [], None
    for index in range(steps):
        step = StepInfo(index, steps, 1.0 - index / steps)
        chosen = technique.choose(step, state)
        if chosen is None:
            latest = path[index]
        else:
            place = chosen[..., None].expand(-1, -1, width)
            latest = latest.scatter(1, place, path[index].gather(1, place))
        if technique.active(step):
            state = technique.observe(latest, chosen, grid, step, state)
        sets.append(chosen)
    return sets, tokens


def widest_gap(sets, tokens, image):
    """Steps between two computations of a token, the longest; None is a step with all tokens."""
    last, gap = torch.full((tokens,), -1), 0
    for index, chosen in enumerate(sets):
        if chosen is None:
            last[:] = index
        else:
            gap = max(gap, int((index - last).max()))
            last[chosen[image]] = index
    return gap


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("selection", ["cluster", "round-robin", "random", "movement", "ras"])
def test_exactly_s_tokens_each_once_and_none_is_forgotten(selection, keep):
    technique = CAT(keep, start=3, selection=selection, clusters=6)
    sets, tokens = history(technique, steps=40)
    count = math.floor(keep * tokens)
    assert [chosen is None for chosen in sets] == [index < 3 for index in range(40)]
    for chosen in sets[3:]:
        assert chosen.shape == (2, count)
        assert bool((chosen.diff(dim=1) > 0).all())
        assert 0 <= int(chosen.min()) <= int(chosen.max()) < tokens
    bounds = {
        "cluster": math.ceil(tokens / (count - count // 4)) + 1,
        "round-robin": math.ceil(tokens / count),
    }
    if selection in bounds:
        gaps = [widest_gap(sets, tokens, image) for image in range(2)]
        assert max(gaps) <= bounds[selection]


def test_the_fast_region_is_followed():
    """Tokens that move thirty times faster are computed more often than the others."""
    sets, tokens = history(CAT(0.3, start=3, clusters=6), steps=40)
    counts = torch.zeros(tokens)
    for chosen in sets[3:]:
        counts[chosen[0]] += 1
    fast = tokens // 6
    assert counts[:fast].mean() > 1.5 * counts[fast:].mean()


def test_images_choose_by_themselves():
    technique = CAT(0.3, start=3, clusters=6)
    both, _ = history(technique)
    assert not torch.equal(both[5][0], both[5][1])


def test_random_sets_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    one, two = (choices.at_random(2, 50, 10, step, CPU) for step in (4, 5))
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(one, two)
    assert torch.equal(one, choices.at_random(2, 50, 10, 4, CPU))
