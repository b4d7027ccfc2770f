"""The optimisers against torch's own."""

import pytest
import torch

from diffalign.noise_opt.steps import adam, nesterov


def gradients(count):
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, generator=rng, dtype=torch.float64) for _ in range(count)]


def test_nesterov_is_that_of_torch():
    weight = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    theirs = torch.optim.SGD([weight], lr=0.3, momentum=0.9, nesterov=True)
    ours, moments = torch.zeros(3, 4, dtype=torch.float64), ()
    for gradient in gradients(5):
        weight.grad = -gradient
        theirs.step()
        update, moments = nesterov(gradient, moments, 0.9)
        ours = ours + 0.3 * update
    torch.testing.assert_close(ours, weight.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_is_that_of_torch(decay):
    start = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
    weight = start.clone().requires_grad_()
    theirs = torch.optim.AdamW([weight], lr=0.05, weight_decay=decay)
    ours, moments = start, ()
    for gradient in gradients(7):
        weight.grad = -gradient
        theirs.step()
        update, moments = adam(gradient, moments)
        ours = ours * (1 - 0.05 * decay) + 0.05 * update
    torch.testing.assert_close(ours, weight.detach(), rtol=1e-9, atol=1e-12)
