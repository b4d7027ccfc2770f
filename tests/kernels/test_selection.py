"""Which tokens come first: by hand, in plain Python, and what cannot be."""

import pytest
import torch

from diffalign.kernels.selection import PLAIN, choose, ranks, smallest
from diffalign.kernels.selection import triton as fused

CPU = torch.device("cpu")
KEYS, VALUES, LABELS = torch.zeros(2, 5).long(), torch.zeros(2, 5), torch.zeros(2, 5).long()


def test_ranks_by_hand():
    """Label 7's tokens 0, 2, 3 have values 1, 5, 3; label 2's tokens 1, 4 have 9, 9."""
    values = torch.tensor([[1.0, 9.0, 5.0, 3.0, 9.0]])
    labels = torch.tensor([[7, 2, 7, 7, 2]])
    assert ranks(values, labels).tolist() == [[2, 0, 0, 1, 1]]


def test_smallest_by_hand():
    keys = torch.tensor([[4, -2, 4, 0, 4], [1, 1, 1, 1, 1]])
    assert smallest(keys, 3).tolist() == [[0, 1, 3], [0, 1, 2]]
    assert smallest(keys, 0).shape == (2, 0)
    assert smallest(keys, 5).tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize("tokens", [1, 37])
def test_in_plain_python(rng, tokens):
    numbers = torch.randint(-4, 4, (3, 3, tokens), generator=rng)
    for values, labels, keys in numbers:
        pairs = list(zip(values.tolist(), labels.tolist()))
        before = [
            sum(
                kind == label and (-other, m) < (-value, n) for m, (other, kind) in enumerate(pairs)
            )
            for n, (value, label) in enumerate(pairs)
        ]
        assert ranks(values[None].float(), labels[None]).tolist() == [before]
        order = sorted(range(tokens), key=lambda n: (keys.tolist()[n], n))
        count = tokens // 3
        assert smallest(keys[None], count).tolist() == [sorted(order[:count])]


def test_choice_on_a_cpu():
    choice = choose(CPU, 300)
    assert choice.call is PLAIN
    assert choice.reason == "torch: cpu tensors (300 tokens)"
    with pytest.raises(ValueError, match="cpu tensors"):
        choose(CPU, 300, backend="triton")


def test_what_the_kernels_do_not_take():
    assert fused.refusal(fused.MAX_TOKENS) is None
    many = torch.zeros(1, fused.MAX_TOKENS + 1)
    with pytest.raises(ValueError, match=r"8193 tokens .* falls back"):
        fused.ranks(many, many.long())
    with pytest.raises(ValueError, match=r"8193 tokens .* falls back"):
        fused.smallest(many.long(), 3)


@pytest.mark.parametrize("form", [PLAIN, fused], ids=["torch", "triton"])
@pytest.mark.parametrize(
    ("name", "operands", "error", "message"),
    [
        ("ranks", (VALUES, LABELS[:1]), ValueError, "must both be"),
        ("ranks", (VALUES[0], LABELS[0]), ValueError, "must both be"),
        ("ranks", (VALUES.double(), LABELS), TypeError, "values must be float32"),
        ("ranks", (VALUES, LABELS.int()), TypeError, "labels int64"),
        ("smallest", (KEYS, 6), ValueError, "0 to N"),
        ("smallest", (KEYS, -1), ValueError, "0 to N"),
        ("smallest", (KEYS[0], 1), ValueError, "must be"),
        ("smallest", (KEYS.float(), 1), TypeError, "must be int64"),
    ],
)
def test_operand_errors(form, name, operands, error, message):
    with pytest.raises(error, match=message):
        getattr(form, name)(*operands)
