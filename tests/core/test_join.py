"""States of several batches become one: tensors, tuples by images, and what all must share."""

from dataclasses import dataclass, replace

import pytest
import torch

from diffalign.core import State, Transition, join
from diffalign.core.rows import join_rows


@dataclass(frozen=True, slots=True)
class Everything:
    """Every kind of part that a technique's state has."""

    # [B, 2]
    values: torch.Tensor
    # [E, B], images on the second axis
    levels: torch.Tensor
    # one entry per image
    crossed: tuple[int | None, ...]
    # one [B] per step
    history: tuple[torch.Tensor, ...]
    index: int = 3

    def select(self, rows):
        rows = list(rows)
        return Everything(
            self.values[rows],
            self.levels[:, rows],
            tuple(self.crossed[row] for row in rows),
            tuple(value[rows] for value in self.history),
            self.index,
        )


def everything(batch, offset=0):
    n = torch.arange(batch) + offset
    return Everything(
        torch.stack([n, -n], 1), torch.stack([n, n + 100, n + 200]), tuple(n.tolist()), (n, n * 2)
    )


def same(a, b):
    return repr(a) == repr(b)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 3), (3, 1, 2), (3, 3)])
def test_the_parts_of_a_state_joined_again_are_the_state(sizes):
    whole, parts, first = everything(sum(sizes)), [], 0
    for size in sizes:
        parts.append(whole.select(range(first, first + size)))
        first += size
    assert same(join_rows(parts, sizes), whole)


def test_what_images_share_must_be_equal():
    with pytest.raises(ValueError, match=r"Everything\.index differs"):
        join_rows([everything(2), replace(everything(2), index=4)], [2, 2])
    with pytest.raises(ValueError, match=r"Everything\.history has different lengths"):
        join_rows([everything(2), replace(everything(2), history=())], [2, 2])
    with pytest.raises(ValueError, match="differs between the states"):
        join_rows([everything(1), None], [1, 1])
    assert join_rows([None, None], [1, 2]) is None


def state(batch, **changes):
    latents = torch.arange(float(batch)).reshape(batch, 1)
    rng = tuple(torch.tensor([i]) for i in range(batch))
    return State(**{"latents": latents, "step": 2, "count": 5, "rng": rng} | changes)


def test_states_are_joined_in_order():
    a = state(2, x0=torch.ones(2, 1), transition=Transition(torch.zeros(2, 1), 0.5))
    b = state(1, x0=torch.zeros(1, 1), transition=Transition(torch.ones(1, 1), 0.5))
    joined = join([a, b])
    assert joined.latents.tolist() == [[0.0], [1.0], [0.0]]
    assert joined.x0.tolist() == [[1.0], [1.0], [0.0]]
    assert joined.transition.mean.tolist() == [[0.0], [0.0], [1.0]]
    assert [int(rng) for rng in joined.rng] == [0, 1, 0]
    assert join([a]) is a


def test_states_that_cannot_be_joined():
    with pytest.raises(ValueError, match="at least one state"):
        join([])
    with pytest.raises(ValueError, match="2 of 5, 3 of 5"):
        join([state(1), state(1, step=3)])
    with pytest.raises(ValueError, match="one shape"):
        join([state(1), state(1, latents=torch.zeros(1, 2))])
    with pytest.raises(ValueError, match="same techniques"):
        join([state(1, techniques={"apg": None}), state(1)])


def test_reseeding_gives_each_image_its_own_generator():
    fresh = state(2).reseed([7, 8])
    assert fresh.reseeded
    assert torch.equal(fresh.rng[1], torch.Generator().manual_seed(8).get_state())
    assert torch.equal(fresh.latents, state(2).latents)
    with pytest.raises(ValueError, match="one seed for each of 2 images; got 1"):
        state(2).reseed([7])


def test_log_densities_are_those_of_a_normal_distribution():
    generator = torch.Generator().manual_seed(0)
    mean, x, drift = (torch.randn(3, 4, 2, generator=generator) for _ in range(3))
    transition = Transition(mean, 0.3, drift)
    for density, centre in ((transition.log_p, mean), (transition.log_q, mean + drift)):
        normal = torch.distributions.Normal(centre.double(), 0.3)
        expected = normal.log_prob(x.double()).flatten(1).sum(1)
        torch.testing.assert_close(density(x), expected)
    assert torch.equal(transition.select([2]).mean, mean[[2]])
    with pytest.raises(ValueError, match="no density"):
        Transition(mean, 0.0).log_p(x)
