"""What every reward with a network does around its network: batches, remembered scores, memory,
gradients computed with the score, errors."""

import pytest
import torch
from torch import nn

from diffalign.rewards import Weighted
from diffalign.rewards.network import NetworkReward


class Cube(NetworkReward):
    """Sum of the cubes of what a linear layer makes of the image's mean colour."""

    name = "cube"

    def __init__(self, **placement):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            layer = nn.Linear(3, 4)
        super().__init__(layer, **placement)
        self.sizes = []

    def measure(self, images, prompts):
        self.sizes.append(len(images))
        colours = self.network(images.mean((2, 3)).to(self.dtype))
        return colours.pow(3).sum(1) + torch.tensor([len(p) for p in prompts]).to(colours)


IMAGES = torch.rand(5, 3, 6, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
PROMPTS = ["a", "bb", "ccc", "dddd", "eeeee"]


def test_gradients_come_with_the_score_in_batches():
    reward = Cube(dtype="fp64", batch=2)
    leaf = IMAGES.clone().requires_grad_()
    weights = torch.tensor([1.0, -2.0, 0.0, 3.0, 0.5], dtype=torch.float64)
    (reward(leaf, PROMPTS) * weights).sum().backward()
    assert reward.sizes == [2, 2, 1]
    plain = IMAGES.clone().requires_grad_()
    (reward.measure(plain, PROMPTS) * weights).sum().backward()
    assert torch.allclose(leaf.grad, plain.grad, rtol=1e-12)


def test_a_second_derivative_is_refused():
    leaf = IMAGES.clone().requires_grad_()
    squares = Cube(dtype="fp64")(leaf, PROMPTS).square()
    (gradient,) = torch.autograd.grad(squares.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_no_graph_is_kept_without_a_gradient():
    assert not Cube()(IMAGES.float(), PROMPTS).requires_grad
    with torch.no_grad():
        assert not Cube()(IMAGES.float().requires_grad_(), PROMPTS).requires_grad


def test_images_are_scored_once():
    reward = Cube(dtype="fp64")
    first = reward(IMAGES, PROMPTS)
    assert torch.equal(reward(IMAGES.flip(0), PROMPTS[::-1]), first.flip(0))
    assert reward.sizes == [5]
    # the prompt counts, and one changed bit
    reward(IMAGES, ["a"] * 5)
    assert reward.sizes == [5, 4]
    changed = IMAGES.clone()
    changed[1, 0, 0, 0] += 2**-52
    reward(changed, PROMPTS)
    assert reward.sizes == [5, 4, 1]


def test_the_same_image_twice_in_a_batch_is_scored_once():
    reward = Cube(dtype="fp64")
    pair = IMAGES[[0, 0, 1]]
    scores = reward(pair, ["a", "a", "a"])
    assert reward.sizes == [2]
    assert scores[0] == scores[1] != scores[2]


def test_the_oldest_scores_are_forgotten_and_none_are_kept_without_room():
    reward = Cube(dtype="fp64", cache=2)
    reward(IMAGES, PROMPTS)
    assert len(reward._scores) == 2
    reward(IMAGES[3:], PROMPTS[3:])
    assert reward.sizes == [5]
    bare = Cube(dtype="fp64", cache=0)
    assert torch.equal(bare(IMAGES, PROMPTS), reward(IMAGES, PROMPTS))
    bare(IMAGES, PROMPTS)
    assert bare.sizes == [5, 5]


class Small(Cube):
    """Memory for two images."""

    def measure(self, images, prompts):
        if len(images) > 2:
            raise torch.OutOfMemoryError("no room")
        return super().measure(images, prompts)


def test_a_batch_that_does_not_fit_is_halved():
    reward = Small(dtype="fp64")
    assert torch.equal(reward(IMAGES, PROMPTS), Cube(dtype="fp64", batch=2)(IMAGES, PROMPTS))
    assert reward.batch == 2
    assert reward.sizes == [2, 2, 1]
    leaf = IMAGES.clone().requires_grad_()
    Small(dtype="fp64")(leaf, PROMPTS).sum().backward()
    assert bool(leaf.grad.abs().sum((1, 2, 3)).gt(0).all())


class Full(Cube):
    def measure(self, images, prompts):
        raise torch.OutOfMemoryError("no room")


def test_memory_for_not_even_one_image():
    with pytest.raises(torch.OutOfMemoryError):
        Full()(IMAGES[:1].float(), ["a"])


def test_offload_brings_the_network_back_whatever_happens():
    moves = []

    class Moved(Cube):
        def measure(self, images, prompts):
            if prompts[0] == "fail":
                raise ValueError("failed")
            return super().measure(images, prompts)

    reward = Moved(offload=True)
    reward.network.to = lambda device: moves.append(str(device))
    reward(IMAGES.float(), PROMPTS)
    assert moves == ["cpu", "cpu"]
    with pytest.raises(ValueError, match="failed"):
        reward(IMAGES[:1].float(), ["fail"])
    assert len(moves) == 4


class Broken(Cube):
    def measure(self, images, prompts):
        return super().measure(images, prompts) * float("nan")


def test_a_score_that_is_not_finite_names_the_reward():
    with pytest.raises(ValueError, match="cube gave a score that is not finite"):
        Broken()(IMAGES.float(), PROMPTS)
    with pytest.raises(ValueError, match="cube gave a score that is not finite"):
        Broken()(IMAGES.float().requires_grad_(), PROMPTS)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch": 0}, "batch must be at least 1"),
        ({"cache": -1}, "cache at least 0"),
        ({"dtype": "int8"}, "dtype must be one of fp32, bf16, fp16, fp64"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(ValueError, match=text):
        Cube(**options)


def test_nothing_else_changes():
    """Weights keep their values, wishes for no gradient and training mode; no random number is
    drawn."""
    reward, state = Cube(dtype="fp64"), torch.get_rng_state()
    weight = reward.network.weight.clone()
    reward(IMAGES.clone().requires_grad_(), PROMPTS).sum().backward()
    assert torch.equal(reward.network.weight, weight)
    assert reward.network.weight.grad is None
    assert not reward.network.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_sum_of_rewards_holds_one_graph_at_a_time():
    """The parts' gradients are computed one after the other, exactly by linearity."""
    a, b = Cube(dtype="fp64"), Cube(dtype="fp64", batch=3)
    leaf = IMAGES.clone().requires_grad_()
    Weighted([(a, 2.0), (b, -0.5)])(leaf, PROMPTS).sum().backward()
    single = IMAGES.clone().requires_grad_()
    a(single, PROMPTS).sum().backward()
    assert torch.allclose(leaf.grad, 1.5 * single.grad, rtol=1e-12)
