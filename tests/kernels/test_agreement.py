"""What runs here agrees with the truth, and a wrong kernel does not."""

import pytest
import torch

from diffalign.kernels import agreement, selection
from diffalign.kernels.agreement import Agreement, agreements
from diffalign.kernels.choice import Choice

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_kernel_agrees_here(dtype):
    found = agreements(CPU, dtype)
    assert [a.kernel for a in found] == ["nag", "pladis", "tokens", "selection"]
    for a in found:
        assert a.choice.startswith("torch: cpu tensors")
        assert a.agrees, a
        assert a.kernel in ("tokens", "selection") or a.error > 0


@pytest.mark.parametrize("room", ["nag", "pladis", "tokens"])
def test_a_wrong_kernel_does_not(room, monkeypatch):
    module = getattr(agreement, room)
    right = module.choose

    def choose(*operands, **options):
        choice = right(*operands, **options)

        def wrong(*tensors, **rest):
            result = choice.call(*tensors, **rest)
            if result is None:
                tensors[0][0, 0, 0, 0] += 1
            return result if result is None else result * (1 + 1e-4)

        return Choice(wrong, "triton: wrong")

    monkeypatch.setattr(module, "choose", choose)
    assert [a.kernel for a in agreements(CPU, torch.float32) if not a.agrees] == [room]


@pytest.mark.parametrize("place", [0, 1])
def test_wrong_places_do_not(place, monkeypatch):
    calls = list(selection.PLAIN)
    right = calls[place]
    calls[place] = lambda *operands: right(*operands).roll(1, 1)
    wrong = Choice(selection.Selection(*calls), "triton: wrong")
    monkeypatch.setattr(selection, "choose", lambda device, count: wrong)
    different = [a.kernel for a in agreements(CPU, torch.float32) if not a.agrees]
    assert different == ["selection"]


def test_an_error_that_is_no_number_is_no_agreement():
    assert not Agreement("nag", "", float("nan"), 1.0).agrees
