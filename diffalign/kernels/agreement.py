"""Whether the kernels that run on a device say what their plain forms say in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffalign.kernels import nag, pladis, selection, tokens
from diffalign.kernels.pladis import naive as pladis_naive

STRENGTH = 2.0


class Agreement(NamedTuple):
    """One kernel beside ``naive.py`` in float64, on the same operands."""

    kernel: str
    # what was chosen and why, "triton: ..." or "torch: ..."
    choice: str
    # largest error of an element, and the largest that rounding explains; 0 where there is none
    error: float
    bound: float

    @property
    def agrees(self) -> bool:
        """Whether the error is explained; an error that is no number never is."""
        return self.error <= self.bound


@torch.no_grad()
def agreements(device: torch.device, dtype: torch.dtype) -> list[Agreement]:
    """Every kernel as it would be chosen for tensors of ``dtype`` on ``device``.

    Cost: a few milliseconds, and the compilation of the fused forms at the first call.
    Raises: whatever a kernel raises that does not run there.
    """
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(device, dtype)

    nag_operands = [draw(2, 64, 640) for _ in range(2)]
    pladis_operands = [draw(2, 8, count, 64) for count in KEYS]
    tokens_operands = [draw(*shape) for shape in (BUFFER, BUFFER, FRESH, FRESH)]
    fused = [_nag(*nag_operands), _pladis(*pladis_operands), _tokens(*tokens_operands)]
    return [*fused, _selection(torch.randint(0, 9, (2, 3, PLACES), generator=rng).to(device))]


# queries, keys and values of a layer that reads 77 text tokens
KEYS = (64, 77, 77)
# tokens of an image, more than one program's, with many of equal value
PLACES = 200
# keys of 7 text and 20 image tokens, and those of a call that computes 5 of these
BUFFER, FRESH = (2, 4, 27, 64), (2, 4, 12, 64)


def _bound(true: Tensor, spread: float, dtype: torch.dtype) -> float:
    """The rounding of weights that sum to ``spread`` of the values and of the result to the dtype,
    and 1e-5 of the result for products in float32."""
    size = float(true.abs().max())
    return torch.finfo(dtype).eps / 2 * (spread + size) + 1e-5 * size


def _nag(pos: Tensor, neg: Tensor) -> Agreement:
    choice = nag.choose(pos)
    ours = choice.call(pos, neg, scale=5.0, tau=2.5, alpha=0.25)
    true = nag.nag(pos.double().cpu(), neg.double().cpu(), scale=5.0, tau=2.5, alpha=0.25)
    return _agreement("nag", choice.reason, ours, true, 0.0)


def _pladis(q: Tensor, k: Tensor, v: Tensor) -> Agreement:
    choice = pladis.choose(q, k)
    ours = choice.call(q, k, v, strength=STRENGTH)
    true = pladis_naive.pladis(*(x.double().cpu() for x in (q, k, v)), strength=STRENGTH)
    spread = (2 * STRENGTH - 1) * float(v.abs().max())
    return _agreement("pladis", choice.reason, ours, true, spread)


def _tokens(keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> Agreement:
    """Numbers are moved: the error is that of the first one in a wrong place."""
    choice = tokens.choose(k)
    index = torch.tensor([[0, 3, 4, 11, 19], [1, 2, 9, 15, 16]], device=k.device)
    true = [x.cpu() for x in (keys.clone(), values.clone())]
    choice.call(keys, values, k, v, index, text_first=True)
    tokens.write(true[0], true[1], k.cpu(), v.cpu(), index.cpu(), text_first=True)
    errors = [float((a.cpu() - b).abs().max()) for a, b in zip((keys, values), true)]
    return Agreement("tokens", choice.reason, max(errors), 0.0)


def _selection(numbers: Tensor) -> Agreement:
    """Places of tokens: the error is how many of them differ."""
    values, labels, keys = numbers.unbind(1)
    choice = selection.choose(values.device, PLACES)
    ours = (choice.call.ranks(values.float(), labels), choice.call.smallest(keys, PLACES // 3))
    true = (
        selection.ranks(values.float().cpu(), labels.cpu()),
        selection.smallest(keys.cpu(), PLACES // 3),
    )
    errors = sum(int((a.cpu() != b).sum()) for a, b in zip(ours, true))
    return Agreement("selection", choice.reason, float(errors), 0.0)


def _agreement(kernel: str, reason: str, ours: Tensor, true: Tensor, spread: float) -> Agreement:
    error = float((ours.double().cpu() - true).abs().max())
    return Agreement(kernel, reason, error, _bound(true, spread, ours.dtype))
