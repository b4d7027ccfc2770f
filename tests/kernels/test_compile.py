"""The torch forms enter a compiled graph whole, with and without gradients."""

import pytest
import torch

from diffalign.kernels import nag, pladis
from diffalign.kernels.pladis import eager


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
def test_torch_forms_are_one_graph(grad, rng):
    """``fullgraph`` raises at the first break; the graph is run by torch itself, so results are
    equal bit for bit."""
    torch.compiler.reset()
    pos, neg = (torch.randn(1, 8, 64, generator=rng) for _ in range(2))
    q, k, v = (torch.randn(1, 2, n, 8, generator=rng) for n in (9, 77, 77))
    pos.requires_grad_(grad), q.requires_grad_(grad)

    def guided(p: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return nag.nag(p, n, scale=5.0, tau=2.5, alpha=0.25)

    def blended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return pladis.pladis(q, k, v, strength=2.0)

    for function, tensors in ((guided, (pos, neg)), (blended, (q, k, v))):
        plain, whole = (
            function(*tensors),
            torch.compile(function, fullgraph=True, backend="eager")(*tensors),
        )
        assert torch.equal(whole, plain)
        if grad:
            ours, theirs = (
                torch.autograd.grad(out.square().sum(), tensors[0])[0] for out in (whole, plain)
            )
            assert torch.equal(ours, theirs)


def test_a_map_of_many_tiles_is_one_tile_to_a_compiler(rng):
    torch.compiler.reset()
    q, k, v = (torch.randn(1, 2, n, 8, generator=rng) for n in (4096, 77, 77))
    assert len(list(eager._tiles(q, 77))) > 1
    maps = []

    def backend(graph, example):
        maps.append(sum("softmax" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    whole = torch.compile(
        lambda *x: pladis.pladis(*x, strength=2.0), fullgraph=True, backend=backend
    )(q, k, v)
    assert maps == [1]
    torch.testing.assert_close(
        whole, pladis.pladis(q, k, v, strength=2.0), rtol=0, atol=1e-5
    )  # float32 products in another order
