"""Keys and values of some tokens among those of all: by hand, in both orders; what cannot be."""

import pytest
import torch

from diffalign.kernels.tokens import choose, write
from diffalign.kernels.tokens import triton as fused


def row(*values):
    """[1, 1, n, 1] of a buffer."""
    return torch.tensor(values, dtype=torch.float32)[None, None, :, None]


def new(*values):
    """[1, 1, n, 1] of a call."""
    return torch.tensor(values, dtype=torch.float32)[None, None, :, None]


@pytest.mark.parametrize(
    ("text_first", "expected"),
    [(True, (10.0, 11.0, 2.0, 13.0, 4.0, 12.0)), (False, (0.0, 11.0, 2.0, 10.0, 12.0, 13.0))],
)
def test_by_hand(text_first, expected):
    """Two text tokens, four of the image; the call computes those at 3 and 1."""
    keys, values = row(0, 1, 2, 3, 4, 5), row(*range(6)) + 100
    k = new(10, 11, 12, 13)
    write(keys, values, k, k + 100, torch.tensor([[3, 1]]), text_first=text_first)
    assert keys.flatten().tolist() == list(expected)
    assert torch.equal(values, keys + 100)


def test_choice_on_a_cpu():
    k = torch.zeros(1, 2, 3, 8)
    choice = choose(k)
    assert choice.call is write
    assert choice.reason == "torch: cpu tensors (float32, 2 heads of size 8)"
    assert choose(k, plain=fused.write).call is fused.write
    with pytest.raises(ValueError, match="cpu tensors"):
        choose(k, backend="triton")


def test_what_the_kernel_does_not_take():
    assert fused.refusal(torch.bfloat16, 24, 128) is None
    assert fused.refusal(torch.float32, 24, 128) is None
    assert "float64" in fused.refusal(torch.float64, 2, 8)
    assert "head size 12" in fused.refusal(torch.float16, 2, 12)
    assert "8192 words" in fused.refusal(torch.float32, 128, 128)
    assert fused.words(torch.bfloat16, 24, 64) == (768, 32)


BUFFER, K, INDEX = torch.zeros(2, 3, 7, 8), torch.zeros(2, 3, 4, 8), torch.zeros(2, 2).long()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": BUFFER[:, 1:]}, ValueError, "must both be"),
        ({"k": K[:, 1:], "v": K[:, 1:]}, ValueError, "must share B, A"),
        ({"index": INDEX[:1]}, ValueError, "must share B, A"),
        ({"index": torch.zeros(2, 5).long()}, ValueError, "must share B, A"),
        ({"keys": BUFFER[:, :, :3], "values": BUFFER[:, :, :3]}, ValueError, "2 of 1 image tokens"),
        ({"v": K.double()}, TypeError, "share one dtype"),
        ({"index": INDEX.float()}, TypeError, "index be integers"),
    ],
)
@pytest.mark.parametrize("call", [write, fused.write], ids=["torch", "triton"])
def test_operand_errors(call, change, error, message):
    operands = {"keys": BUFFER, "values": BUFFER.clone(), "k": K, "v": K, "index": INDEX}
    with pytest.raises(error, match=message):
        call(**{**operands, **change}, text_first=True)


def test_errors_of_the_kernel_alone():
    keys, k = BUFFER.clone(), K.clone().requires_grad_()
    wide = torch.zeros(2, 3, 7, 16)[..., :8]
    narrow = [x[..., :4].contiguous() for x in (BUFFER, BUFFER, K, K)]
    with pytest.raises(ValueError, match="contiguous"):
        fused.write(wide, wide, K, K, INDEX, text_first=True)
    with pytest.raises(ValueError, match="no gradient"):
        fused.write(keys, keys, k, K, INDEX, text_first=True)
    with pytest.raises(ValueError, match="head size 4"):
        fused.write(*narrow, INDEX, text_first=True)
