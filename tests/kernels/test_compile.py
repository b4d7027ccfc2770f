"""The torch forms enter a compiled graph whole, with and without gradients."""

import pytest
import torch

from diffalign.kernels import nag, pladis


@pytest.mark.parametrize("grad", [False, True])
def test_torch_forms_are_one_graph(grad, rng):
    """``fullgraph`` raises at the first break; the graph is run by torch itself, so results are equal bit for bit."""
    torch.compiler.reset()
    pos, neg = (torch.randn(1, 8, 64, generator=rng) for _ in range(2))
    q, k, v = (torch.randn(1, 2, n, 8, generator=rng) for n in (4096, 77, 77))  # in eager mode more than one tile
    pos.requires_grad_(grad), q.requires_grad_(grad)

    def guided(p: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return nag.nag(p, n, scale=5.0, tau=2.5, alpha=0.25)

    def blended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return pladis.pladis(q, k, v, strength=2.0)

    for function, tensors in ((guided, (pos, neg)), (blended, (q, k, v))):
        plain, whole = function(*tensors), torch.compile(function, fullgraph=True, backend="eager")(*tensors)
        torch.testing.assert_close(whole, plain, rtol=0, atol=1e-5)
        if grad:
            ours, theirs = (torch.autograd.grad(out.square().sum(), tensors[0])[0] for out in (whole, plain))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
