"""Keys and values are written as the kernels' plain form writes them, by whatever was chosen."""

import pytest
import torch

from diffalign.kernels import tokens
from diffalign.kernels.choice import Choice
from diffalign.seams.tokens import memory
from diffalign.seams.tokens.memory import Places

ROWS, HEADS, SIZE, TOKENS, KEPT = 2, 3, 4, 7, 3


def draw(rng, *shape):
    return torch.randn(shape, generator=rng)


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def index(rng):
    orders = [torch.randperm(TOKENS, generator=rng)[:KEPT].sort().values for _ in range(ROWS)]
    return torch.stack(orders)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize(("before", "text"), [(2, 2), (0, 0), (2, 5)])
def test_the_same_bits_as_the_plain_form(rng, index, before, text, text_first, in_place):
    """Also where the number of text tokens has changed."""
    k, v = (draw(rng, ROWS, HEADS, text + KEPT, SIZE) for _ in range(2))
    old = [draw(rng, ROWS, HEADS, before + TOKENS, SIZE) for _ in range(2)]
    images = [x[:, :, before:] if text_first else x[:, :, :TOKENS] for x in old]
    empty = torch.zeros(ROWS, HEADS, text, SIZE)
    true = [torch.cat([empty, x] if text_first else [x, empty], 2) for x in images]
    tokens.write(*true, k, v, index, text_first=text_first)
    copies = [x.clone() for x in old]
    ours = Places(index, TOKENS).written(copies, (k, v), text_first, in_place)
    assert all(torch.equal(a, b) for a, b in zip(ours, true, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(copies, old)) or in_place


def test_the_chosen_kernel_runs_once_for_a_size(rng, index, monkeypatch):
    calls, choices = [], []

    def choose(k, plain):
        choices.append(tuple(k.shape))
        return Choice(lambda *tensors, text_first: calls.append(text_first), "triton: a stand-in")

    monkeypatch.setattr(memory, "choose", choose)
    places = Places(index, TOKENS)
    k = draw(rng, ROWS, HEADS, 2 + KEPT, SIZE)
    buffers = [draw(rng, ROWS, HEADS, 2 + TOKENS, SIZE) for _ in range(2)]
    for text_first in (True, False):
        places.written(buffers, (k, k), text_first, True)
    assert (calls, choices) == ([True, False], [tuple(k.shape)])
    narrow = k[..., :2]
    places.written([buffers[0], buffers[1][..., :2].clone()], (k, narrow), True, True)
    assert len(calls) == 2  # the kernel takes keys and values of one shape
