"""The tree itself: hand-made trees, the law of a descent, and what a round copies."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from diffalign.core import Lineage, State
from diffalign.search.tree import (
    Batch,
    Grown,
    Rule,
    Spot,
    Workspace,
    branch_levels,
    thumbnail,
)


def grown(shape, tilt=1.0, backup="soft"):
    """A tree from nested lists: a number is a leaf with that score."""
    images = Batch(State(torch.zeros(1, 1), 9, 9, ()), torch.zeros(1, 3, 1, 1, dtype=torch.uint8))
    work = Workspace(Grown(Rule(2.0, 0.8), (0, 3, 6), tilt, backup, batches=(images,)))
    leaves, scores = [], []

    def add(parent, item, depth):
        if isinstance(item, list):
            place = work.attach(Spot(parent, 3 * depth, Lineage(()), 0))
            for child in item:
                add(place, child, depth + 1)
        else:
            leaves.append(work.attach(Spot(parent, 9, Lineage(()), 0, leaf=True), item))
            scores.append(item)

    for child in shape:
        add(0, child, 1)
    work.back_up(leaves)
    return work.frozen(scores)


THREE = [[[1.0, 2.0], [0.5]], [[-1.0, 0.0, 3.0]]]


def soft(values, tilt):
    return math.log(sum(math.exp(tilt * v) for v in values) / len(values)) / tilt


@pytest.mark.parametrize("tilt", [0.3, 1.0, 4.0])
def test_backup_is_the_nested_soft_mean(tilt):
    tree = grown(THREE, tilt)
    left = soft([soft([1.0, 2.0], tilt), 0.5], tilt)
    right = soft([-1.0, 0.0, 3.0], tilt)  # through a state with one child
    assert tree.values[0] == pytest.approx(soft([left, right], tilt), abs=1e-12)
    assert tree.range == (-1.0, 3.0)


def test_largest_value_is_the_limit_of_a_large_tilt():
    """log(n) / tilt apart at most for n leaves."""
    largest = grown(THREE, backup="max")
    sharp = grown(THREE, tilt=200.0)
    assert largest.values[0] == 3.0
    for a, b in zip(largest.values, sharp.values):
        assert b == pytest.approx(a, abs=math.log(6) / 200 + 1e-12)


def test_backup_is_uniform_over_children():
    """Equal draws of the model: visits do not count."""
    tree = grown([[[2.0]], [[0.0]]])
    assert tree.values[0] == pytest.approx(soft([2.0, 0.0], 1.0))
    assert grown([800.0, 0.0]).values[0] == pytest.approx(800.0 - math.log(2))


def random_shape(rng, depth):
    if depth == 0:
        return float(rng.normal())
    return [random_shape(rng, depth - 1) for _ in range(int(rng.integers(1, 5)))]


@pytest.mark.parametrize("seed", range(5))
def test_descents_have_the_probability_of_the_weights(seed):
    """Products of softmax choices along the path to each leaf equal W / sum W."""
    tilt = 1.7
    tree = grown(random_shape(np.random.default_rng(seed), 3), tilt)
    weighted = tree.weighted()
    for place, leaf in enumerate(tree.leaves):
        path, probability = tree.path(leaf), 1.0
        for above, child in pairwise(path):
            values = {c: math.exp(tilt * tree.values[c]) for c in tree.children[above]}
            probability *= values[child] / sum(values.values())
        assert probability == pytest.approx(float(weighted.shares[place]), abs=1e-9)
    total = float(torch.logsumexp(weighted.log_weights, 0))
    assert weighted.log_evidence == pytest.approx(total, abs=1e-9)
    assert tilt * tree.values[0] == pytest.approx(total, abs=1e-9)
    assert tree.effective == pytest.approx(weighted.effective, rel=1e-9)


def test_weighting_by_visits_breaks_the_identity():
    """Negative control: a backup that counts a visited child twice."""
    tilt, shape = 1.0, [[1.0, 2.0], [0.5]]
    tree = grown(shape, tilt)
    values = list(tree.values)
    left, right = tree.children[0]
    values[0] = math.log((2 * math.exp(values[left]) + math.exp(values[right])) / 3)
    assert abs(values[0] - tree.weighted().log_evidence) > 0.05


def test_greedy_descent_is_not_the_best_leaf():
    """Soft values prefer many good images to one."""
    tree = grown([[[2.0, 2.0, 2.0]], [[2.5, -9.0, -9.0]]])
    assert tree.values[tree.greedy()[-1]] == 2.0
    assert tree.values[tree.drawing().best[-1]] == 2.5


def test_drawing_has_parents_first_and_an_image_for_each_leaf():
    drawing = grown(THREE).drawing()
    assert all(n.parent is None or n.parent < i for i, n in enumerate(drawing.nodes))
    assert [n.value for n in drawing.nodes if n.image is not None] == [1.0, 2.0, 0.5, -1.0, 0, 3.0]
    assert len(drawing.images) == 6
    assert drawing.best[0] == 0
    assert drawing.nodes[drawing.best[-1]].value == 3.0


def test_a_round_leaves_the_tree_as_it_was():
    tree = grown(THREE)
    work = Workspace(tree)
    before = (tree.spots, tree.children, tree.values, tree.visits)
    work.visit([0, 1])
    work.attach(Spot(1, 9, Lineage(()), 0, leaf=True), 7.0)
    work.back_up([len(work.spots) - 1])
    after = work.frozen([7.0])
    assert (tree.spots, tree.children, tree.values, tree.visits) == before
    assert after.values[0] > tree.values[0]
    assert after.visits[:2] == (tree.visits[0] + 1, tree.visits[1] + 1)


def test_first_descents_of_the_presets():
    """The table of the card: rollouts before the rule lets one descend."""
    for (width, growth), expected in {
        (2, 0.8): 36,
        (2, 0.7): 13,
        (2, 0.5): 5,
        (1.5, 0.6): 4,
        (1, 0.8): 4,
        (2, 0.3): 4,
        (1, 0.5): 2,
    }.items():
        rule, rollouts = Rule(width, growth), 0
        while rule.open(rollouts, 1 + rollouts):
            rollouts += 1
        assert rollouts == expected, (width, growth)


def test_branch_levels():
    assert branch_levels(50, 5) == (0, 10, 20, 30, 40)
    assert branch_levels(100, 5) == (0, 20, 40, 60, 80)
    assert branch_levels(4, 5) == (0, 1, 2)
    assert branch_levels(2, 5) == (0,)  # before the last evaluation children would be alike
    assert branch_levels(1, 5) == (0,)
    assert branch_levels(25, 1) == (0,)


def test_thumbnails_are_small_and_keep_the_shape():
    image = torch.linspace(0, 1, 3 * 96 * 192).view(3, 96, 192)
    picture = thumbnail(image)
    assert picture.shape == (3, 32, 64)
    assert picture.dtype == torch.uint8
    means = image.view(3, 32, 3, 64, 3).mean((2, 4)) * 255
    assert float((picture - means).abs().max()) <= 0.51
    assert torch.equal(thumbnail(torch.full((3, 8, 8), 0.5)), torch.full((3, 8, 8), 128).byte())
