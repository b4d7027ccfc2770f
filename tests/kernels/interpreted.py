"""Run the Triton kernels under Triton's interpreter on the CPU and compare them with ``naive.py``
in float64.

One JSON object per case goes to standard output; ``test_interpreter.py`` starts this file in a
process of its own, because the interpreter must be chosen before Triton is imported. Its argument
is a dtype, float32 or float16; bfloat16 arithmetic is wrong in the interpreter.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

from diffalign.kernels.nag import naive as nag_naive
from diffalign.kernels.nag import triton as nag_triton
from diffalign.kernels.pladis import naive as pladis_naive
from diffalign.kernels.pladis import triton as pladis_triton
from diffalign.kernels.pladis.scores import scores, softmax, split_mask
from diffalign.kernels.selection import naive as selection_naive
from diffalign.kernels.selection import triton as selection_triton
from diffalign.kernels.tokens import naive as tokens_naive
from diffalign.kernels.tokens import triton as tokens_triton

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11}


def normal(rng: torch.Generator, *shape: int, dtype: torch.dtype, std: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=rng, dtype=torch.float64) * std).to(dtype)


def nag_cases(rng: torch.Generator, dtype: torch.dtype) -> Iterator[dict[str, object]]:
    """Fused against float64; the bound is 8 roundings of float32 on every operand of the blend plus
    the final rounding."""
    setting = {"scale": 5.0, "tau": 2.5, "alpha": 0.25}
    for batch, tokens, channels in (
        (2, 3, 40),
        (1, 5, 640),
        (2, 2, 1280),
        (1, 2, 3072),
        (1, 1, 5120),
    ):
        for norm in ("l1", "l2"):
            pos = normal(rng, batch, tokens, channels, dtype=dtype)
            neg = normal(rng, batch, tokens, channels, dtype=dtype)
            neg[:, 1:2] = pos[:, 1:2] + 0.05 * neg[:, 1:2]  # one token that is not clipped
            pos[:, 2:3] = 0  # and one whose positive row is zero
            got = nag_triton.nag(pos, neg, norm=norm, **setting)
            yield {
                "name": f"nag {batch}x{tokens}x{channels} {norm} {dtype}",
                **nag_errors(got, pos, neg, norm, setting),
            }
    wide = normal(rng, 2, 7, 4 * 40 + 3, dtype=dtype)
    for what, pos, neg in (
        (
            "rows 16-byte aligned",
            wide[:, ::2, :40].contiguous()[:, 1:],
            normal(rng, 2, 6, 40, dtype=dtype)[:, ::2],
        ),
        (
            "rows not aligned",
            wide[:, 1:4, 3:43],
            normal(rng, 2, 40, 3, dtype=dtype).transpose(1, 2),
        ),
    ):
        got = nag_triton.nag(pos, neg, norm="l1", **setting)
        yield {
            "name": f"nag strided, {what} {dtype}",
            **nag_errors(got, pos, neg, "l1", setting),
        }


def nag_errors(
    got: Tensor, pos: Tensor, neg: Tensor, norm: str, setting: dict[str, float]
) -> dict[str, float]:
    true = nag_naive.nag(pos.double(), neg.double(), norm=norm, **setting)
    operands = pos.double().abs() + setting["scale"] * (pos.double() - neg.double()).abs()
    bound = (
        8 * 2.0**-24 * operands
        + UNIT_ROUNDOFF[got.dtype] * true.abs()
        + torch.finfo(got.dtype).smallest_normal
    )
    return {
        "worst": ((got.double() - true).abs() / bound).max().item(),
        "error": (got.double() - true).abs().max().item(),
    }


def pladis_cases(rng: torch.Generator, dtype: torch.dtype) -> Iterator[dict[str, object]]:
    for size, keys, queries in (
        (40, 77, 33),
        (64, 154, 17),
        (72, 300, 19),
        (128, 512, 18),
        (160, 77, 33),
        (64, 1, 3),
        (80, 64, 65),
    ):
        for alpha, strength in ((1.5, 2.0), (2.0, 1.5), (1.5, 0.0), (1.5, 1.0)):
            q = normal(rng, 2, 2, queries, size, dtype=dtype, std=2)
            k, v = (normal(rng, 2, 2, keys, size, dtype=dtype) for _ in range(2))
            yield pladis_case(
                f"D{size} K{keys} N{queries}", q, k, v, strength=strength, alpha=alpha
            )
    for what, size in (
        ("flat", 0.0),
        ("nearly flat", 0.02),
        ("two levels", None),
        ("geometric", 40.0),
    ):  # hard for Newton's method
        q = torch.ones(1, 1, 4, 64, dtype=dtype)
        k = torch.zeros(1, 1, 512, 64, dtype=dtype)
        order = torch.arange(512)
        levels = (
            (order < 100) * 1.0
            if size is None
            else size * 0.97**order
            if size > 1
            else size * torch.randn(512, generator=rng)
        )
        k[0, 0, :, 0] = levels.to(dtype)
        v = normal(rng, 1, 1, 512, 64, dtype=dtype)
        for alpha in (1.5, 2.0):
            yield pladis_case(f"{what} rows", q, k, v, strength=2.0, alpha=alpha, scale=1.0)
    size, keys, queries, heads = 40, 77, 19, 3
    q = normal(rng, 2, queries, heads, size, dtype=dtype, std=2).transpose(
        1, 2
    )  # the layout of the processors
    k = normal(rng, 2, keys, heads, size, dtype=dtype).transpose(1, 2)
    v = normal(rng, 2, heads, keys + 1, size + 3, dtype=dtype)[..., 1:, 3:]  # not aligned: copied
    keep = torch.rand(2, 1, 1, keys, generator=rng) < 0.6
    dead = keep.clone()
    dead[1] = False
    for name, mask in (
        ("boolean mask", keep),
        ("a row of the batch without keys", dead),
        ("mask for all rows", keep[0, 0]),
        ("bias -10000", torch.where(keep, 0.0, -10000.0).to(dtype)),
        ("bias -inf", torch.where(keep, 0.5, float("-inf")).to(dtype)),
    ):
        for alpha in (1.5, 2.0):
            yield pladis_case(name, q, k, v, strength=2.0, alpha=alpha, mask=mask)
    base = normal(rng, 2, heads, queries, size, dtype=dtype)
    mass = torch.rand(2, heads, queries, generator=rng).to(dtype)
    shifted = normal(rng, 2, heads, queries, size + 3, dtype=dtype)[..., 3:]
    yield pladis_case(
        "joint, base not aligned", q, k, v, strength=2.0, alpha=1.5, base=shifted, mass=mass
    )
    float_mask = torch.where(keep, 0.25, -1e5)  # float32 beside 16-bit queries
    yield pladis_case("float32 bias", q, k, v, strength=2.0, alpha=1.5, mask=float_mask)
    yield pladis_case("joint", q, k, v, strength=2.0, alpha=1.5, base=base, mass=mass)
    yield pladis_case(
        "joint, masked, own scale",
        q,
        k,
        v,
        strength=1.5,
        alpha=2.0,
        base=base,
        mass=mass,
        mask=dead,
        scale=0.3,
    )
    yield pladis_case("anchored without mass", q, k, v, strength=2.0, alpha=1.5, base=base)


def pladis_case(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    strength: float,
    alpha: float,
    **rest: Tensor | float,
) -> dict[str, object]:
    """Fused against float64. Bound per element: twice the worst error of ``naive.py`` in float32 on
    the same operands (kernel rule) with a floor of 4 roundings, plus the rounding of the weights
    and of the result to the dtype, ``u (sum |w| |v| + |out|)``.
    """
    got = pladis_triton.pladis(q, k, v, strength=strength, alpha=alpha, **rest)
    assert got.transpose(1, 2).is_contiguous(), "the promised memory layout is [B, N, A, D]"
    true, plain = (
        pladis_naive.pladis(
            *(t.to(d) for t in (q, k, v)), strength=strength, alpha=alpha, **cast(rest, d)
        )
        for d in (torch.float64, torch.float32)
    )
    wide = cast(rest, torch.float64)
    bias, keep = split_mask(wide.get("mask"), torch.float64)
    z = scores(q.double(), k.double(), rest.get("scale"), bias)
    dense, sparse = softmax(z, keep), pladis_naive.exact.entmax(z, alpha, mask=keep)
    weights = (
        (dense * abs(1 - strength) + sparse * abs(strength))
        if "base" not in rest
        else (dense + sparse) * abs(strength)
    )
    moved = weights @ v.double().abs()
    u = UNIT_ROUNDOFF[got.dtype]
    single = 2.0**-24
    bound = (
        2 * (plain - true).abs().max()
        + 4 * single * (moved + true.abs())
        + (u > single) * u * (moved + true.abs())
    )
    error = (got.double() - true).abs()
    worst = (error / bound.clamp_min(torch.finfo(got.dtype).smallest_normal)).max().item()
    return {
        "name": f"pladis {name} alpha {alpha} strength {strength} {got.dtype}",
        "worst": worst,
        "error": error.max().item(),
    }


def cast(options: dict[str, Tensor | float], dtype: torch.dtype) -> dict[str, Tensor | float]:
    return {
        n: t.to(dtype) if isinstance(t, Tensor) and t.dtype != torch.bool else t
        for n, t in options.items()
    }


def tokens_cases(rng: torch.Generator, dtype: torch.dtype) -> Iterator[dict[str, object]]:
    """Fused against ``naive.py``: numbers are moved, so not one bit may differ."""
    for batch, heads, size, text, tokens, kept in (
        (2, 3, 40, 5, 12, 4),
        (1, 24, 64, 3, 6, 6),
        (2, 2, 72, 0, 9, 1),
        (1, 2, 8, 4, 5, 0),
    ):
        for text_first in (True, False):
            k, v = (normal(rng, batch, heads, text + kept, size, dtype=dtype) for _ in range(2))
            # in the layout of the processors, and not aligned: copied
            v = torch.cat([v, v], -1)[..., 3 : 3 + size] if heads == 2 else v
            k = k.transpose(1, 2).contiguous().transpose(1, 2)
            order = [torch.randperm(tokens, generator=rng)[:kept] for _ in range(batch)]
            index = torch.stack(order)
            before = [normal(rng, batch, heads, text + tokens, size, dtype=dtype) for _ in "kv"]
            ours, true = [x.clone() for x in before], [x.clone() for x in before]
            tokens_triton.write(*ours, k, v, index, text_first=text_first)
            tokens_naive.write(*true, k, v, index, text_first=text_first)
            equal = all(torch.equal(a, b) for a, b in zip(ours, true))
            place = "first" if text_first else "last"
            name = f"tokens {batch}x{heads}x{size}, {kept} of {tokens}, {text} of text {place}"
            yield {"name": f"{name} {dtype}", "worst": 0.0 if equal else float("inf")}


def selection_cases(rng: torch.Generator) -> Iterator[dict[str, object]]:
    """Fused against ``naive.py``: places, of which not one may differ."""

    def draw(limit: int, *shape: int) -> Tensor:
        return torch.randint(-limit, limit, shape, generator=rng)

    for batch, tokens, limit in ((2, 300, 4), (1, 64, 1 << 40), (3, 65, 1), (1, 1, 9)):
        # of equal values and labels many, or none
        values, labels = draw(limit, batch, tokens).float(), draw(3, batch, tokens)
        pairs = {"ranks": [x.ranks(values, labels) for x in (selection_triton, selection_naive)]}
        for count in {0, tokens // 3, tokens}:
            keys = draw(limit, tokens, batch).T * 3 - 7  # not dense, some negative
            pairs[f"smallest {count}"] = [
                x.smallest(keys, count) for x in (selection_triton, selection_naive)
            ]
        wrong = [name for name, (ours, true) in pairs.items() if not torch.equal(ours, true)]
        for name in pairs:
            worst = float("inf") if name in wrong else 0.0
            yield {"name": f"selection {batch}x{tokens} {name}", "worst": worst}
    extremes = torch.tensor([[2**63 - 1, -(2**63), 0, -1]])
    ours = selection_triton.smallest(extremes, 2)
    equal = ours.tolist() == [[1, 3]]
    yield {"name": "selection extremes", "worst": 0.0 if equal else float("inf")}


def traffic(run: Callable[[], Tensor]) -> dict[str, int]:
    """Elements that ``run`` loads and stores through the interpreter, and how many different
    addresses they are."""
    loads: list[np.ndarray] = []
    stores: list[np.ndarray] = []
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_load(self: object, ptrs: object, mask: object, *rest: object) -> object:
        loads.append(ptrs.data[mask.data])
        return load(self, ptrs, mask, *rest)

    def counted_store(
        self: object, ptrs: object, value: object, mask: object, *rest: object
    ) -> object:
        stores.append(ptrs.data[mask.data])
        return store(self, ptrs, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    try:
        run()
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
    read, written = np.concatenate(loads), np.concatenate(stores)
    return {
        "loads": read.size,
        "load_addresses": np.unique(read).size,
        "stores": written.size,
        "store_addresses": np.unique(written).size,
    }


def traffic_cases(rng: torch.Generator) -> Iterator[dict[str, object]]:
    for norm in ("l1", "l2"):
        pos, neg = (normal(rng, 2, 3, 200, dtype=torch.float16) for _ in range(2))
        settings = {"scale": 5, "tau": 2.5, "alpha": 0.25, "norm": norm}
        counts = traffic(partial(nag_triton.nag, pos, neg, **settings))
        yield {"name": f"traffic nag {norm}", "elements": pos.numel(), **counts}
    k, v = (normal(rng, 1, 3, 7, 40, dtype=torch.float16) for _ in range(2))
    buffers = [torch.zeros(1, 3, 14, 40, dtype=torch.float16) for _ in range(2)]
    index = torch.tensor([[9, 2, 4, 0]])
    counts = traffic(lambda: tokens_triton.write(*buffers, k, v, index, text_first=True))
    # words of two numbers, and the index at the image tokens
    yield {"name": "traffic tokens", "elements": k.numel(), "index": index.numel(), **counts}
    q, k, v = (normal(rng, 1, 2, n, 40, dtype=torch.float16) for n in (16, 77, 77))
    counts = traffic(lambda: pladis_triton.pladis(q, k, v, strength=2.0))
    yield {
        "name": "traffic pladis one row tile",
        "elements": q.numel() + k.numel() + v.numel(),
        "results": q.numel(),
        **counts,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    dtype = {"float32": torch.float32, "float16": torch.float16}[sys.argv[1]]
    kernels = (nag_cases(rng, dtype), pladis_cases(rng, dtype), tokens_cases(rng, dtype))
    for cases in (*kernels, selection_cases(rng), traffic_cases(rng)):
        for case in cases:
            print(json.dumps(case), flush=True)
