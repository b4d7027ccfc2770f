"""How long do the attention kernels take beside the published eager form, torch.compile of the short form, and plain attention?

    python benchmarks/kernels.py [--runs 50] [--dtype bfloat16] [--no-compile] [--seed 0] [--output benchmarks/results]

On a GPU: milliseconds at the shapes of SDXL, SD3-medium, Flux.1 and Wan 2.1. On a CPU: ratios of the paths that run there, in float32 and
with a sixteenth of the image tokens; they say nothing about a GPU. The title of the table says which of the two was run. Every form is
compared with the float64 truth on its first rows before it is timed, and a form whose error is out of bounds stops the run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, TypedDict

import entmax
import torch
from results import write
from torch import Tensor
from torch.nn import functional as F

from diffalign.kernels import nag, pladis
from diffalign.kernels.pladis import naive as pladis_naive


class Setting(TypedDict):
    scale: float
    tau: float
    alpha: float


NAG: Setting = {"scale": 5.0, "tau": 2.5, "alpha": 0.25}
STRENGTH = 2.0
CPU_SHARE = 16  # a CPU gets this fraction of the image tokens
NAG_SHAPES = {  # image tokens, channels
    "SDXL 64x64": (4096, 640),
    "SDXL 32x32": (1024, 1280),
    "SD3-medium": (4096, 1536),
    "Flux.1": (4096, 3072),
    "Wan 1.3B 81 frames": (32760, 1536),
    "Wan 14B 81 frames": (32760, 5120),
}
PLADIS_SHAPES = {  # heads, image tokens, text tokens, head size
    "SDXL 64x64": (10, 4096, 77, 64),
    "SDXL 32x32": (20, 1024, 77, 64),
    "PixArt-Sigma": (16, 4096, 300, 72),
    "SD3-medium image x text": (24, 4096, 333, 64),
    "Flux.1 image x text": (24, 4096, 512, 128),
    "Wan 1.3B 81 frames": (12, 32760, 512, 128),
}


def published_nag(z_pos: Tensor, z_neg: Tensor) -> Tensor:
    """The steps of the published code in its order: the norms are expanded to full size before ratio, minimum and division."""
    guided = z_pos * NAG["scale"] - z_neg * (NAG["scale"] - 1)
    size = torch.norm(z_pos, p=1, dim=-1, keepdim=True).expand(*z_pos.shape)
    grown = torch.norm(guided, p=1, dim=-1, keepdim=True).expand(*z_pos.shape)
    ratio = grown / size
    guided = guided * torch.minimum(ratio, ratio.new_full((1,), NAG["tau"])) / ratio
    return guided * NAG["alpha"] + z_pos * (1 - NAG["alpha"])


def published_pladis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores, softmax and the sorting entmax of the ``entmax`` package in the model's dtype, one product with the values."""
    z = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    dense = z.softmax(-1)
    return (dense + STRENGTH * (entmax.entmax15(z, -1) - dense)) @ v


def timer(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    """A function that gives one call's milliseconds, by events on a GPU and by the wall clock on a CPU."""

    def wall(call: Callable[[], Any]) -> float:
        started = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - started)

    def events(call: Callable[[], Any]) -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop))

    return events if device.type == "cuda" else wall


def clocked(forms: dict[str, Callable[[], Any]], runs: int, device: torch.device) -> dict[str, float]:
    """Milliseconds per form: median on a GPU, best on a CPU that others may use too. Forms take turns, so that drift hits all of them."""
    clock = timer(device)
    times: dict[str, list[float]] = {name: [] for name in forms}
    for call in forms.values():  # compiles and warms up
        for _ in range(3):
            call()
    for _ in range(runs):
        for name, call in forms.items():
            times[name].append(clock(call))
    return {name: statistics.median(values) if device.type == "cuda" else min(values) for name, values in times.items()}


def measure(forms: dict[str, Callable[[], Tensor]], true: Tensor, spread: float, options: argparse.Namespace) -> dict[str, Any]:
    """Times (GPU) or ratios to ``published`` (CPU) of all forms, and the largest errors of the published and the chosen form.

    Our forms may err by the rounding of the weights and of the result, ``eps / 2 (spread + |true|)`` with ``spread`` the largest
    ``sum |w| |v|``, plus 1e-5 of the result for float32 arithmetic.
    """
    rows, errors = true.shape[-2], {}
    size = float(true.abs().max())
    for name, call in forms.items():
        if name != "sdpa":
            got = call()[..., :rows, :]
            errors[name] = float((got.double() - true).abs().max())
            bound = torch.finfo(got.dtype).eps / 2 * (spread + size) + 1e-5 * size
            if name != "published" and not errors[name] <= bound:
                raise SystemExit(f"{name} is wrong: error {errors[name]:.2e}, bound {bound:.2e}. No time is reported.")
    times = clocked(forms, options.runs, options.torch_device)
    if options.torch_device.type == "cuda":
        row: dict[str, Any] = {f"{name} ms": value for name, value in times.items()}
    else:
        row = {f"{name} / published": value / times["published"] for name, value in times.items() if name != "published"}
    ours = "triton" if "triton" in forms else "torch"
    return {**row, "error published": errors["published"] / size, f"error {ours}": errors[ours] / size}


def nag_row(model: str, options: argparse.Namespace, rng: torch.Generator) -> dict[str, Any]:
    tokens, channels = NAG_SHAPES[model]
    tokens //= options.share
    pos, neg = (torch.randn(1, tokens, channels, generator=rng, device=rng.device).to(options.torch_dtype) for _ in range(2))
    forms: dict[str, Callable[[], Tensor]] = {
        "published": lambda: published_nag(pos, neg),
        "torch": lambda: nag.nag(pos, neg, **NAG),
    }
    if options.compile:
        short = torch.compile(lambda p, n: nag.nag(p, n, **NAG), dynamic=False)
        forms["compiled"] = lambda: short(pos, neg)
    choice = nag.choose(pos)
    if choice.call is not nag.nag:
        forms["triton"] = lambda: choice.call(pos, neg, **NAG)
    rows = min(64, tokens)
    true = nag.nag(pos[:, :rows].double(), neg[:, :rows].double(), **NAG)
    shape = f"{tokens} x {channels}"
    found = measure(forms, true, 0.0, options)
    if options.torch_device.type == "cuda":
        best = min(found[f"{name} ms"] for name in forms)
        found["GB/s at 3 sweeps, best"] = 3 * pos.numel() * pos.element_size() / best / 1e6
    return {"kernel": "NAG epilogue", "model": model, "shape": shape, **found, "chosen": choice.reason}


def pladis_row(model: str, options: argparse.Namespace, rng: torch.Generator) -> dict[str, Any]:
    heads, tokens, keys, size = PLADIS_SHAPES[model]
    tokens //= options.share
    q, k, v = (torch.randn(1, n, heads, size, generator=rng, device=rng.device) for n in (tokens, keys, keys))
    q, k, v = ((t * s).to(options.torch_dtype).transpose(1, 2) for t, s in ((q, 2.0), (k, 1.0), (v, 1.0)))
    forms: dict[str, Callable[[], Tensor]] = {
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v),
        "published": lambda: published_pladis(q, k, v),
        "torch": lambda: pladis.pladis(q, k, v, strength=STRENGTH),
    }
    if options.compile:
        short = torch.compile(lambda q, k, v: pladis.pladis(q, k, v, strength=STRENGTH), dynamic=False)
        forms["compiled"] = lambda: short(q, k, v)
    choice = pladis.choose(q, k)
    if choice.call is not pladis.pladis:
        forms["triton"] = lambda: choice.call(q, k, v, strength=STRENGTH)
    rows = min(64, tokens)
    true = pladis_naive.pladis(q[:, :, :rows].double(), k.double(), v.double(), strength=STRENGTH)
    shape = f"{tokens} x {keys} keys, {heads} x {size}"
    return {
        "kernel": "PLADIS",
        "model": model,
        "shape": shape,
        **measure(forms, true, (2 * STRENGTH - 1) * float(v.abs().max()), options),
        "chosen": choice.reason,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="on a GPU; a CPU runs float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--share", type=int, help=f"divide the image tokens by this; default 1 on a GPU, {CPU_SHARE} on a CPU")
    parser.add_argument("--output", default="benchmarks/results")
    options = parser.parse_args(arguments)
    gpu = options.device == "cuda"
    options.share = options.share or (1 if gpu else CPU_SHARE)
    public = argparse.Namespace(**vars(options))
    options.torch_device, options.torch_dtype = torch.device(options.device), getattr(torch, options.dtype) if gpu else torch.float32
    if not gpu:
        torch.set_num_threads(1)
    rng = torch.Generator(options.device).manual_seed(options.seed)
    with torch.no_grad():
        rows = [nag_row(model, options, rng) for model in NAG_SHAPES] + [pladis_row(model, options, rng) for model in PLADIS_SHAPES]
    what = f"run on a GPU: times in {options.dtype}" if gpu else f"run on a CPU: ratios in float32, 1/{options.share} of the image tokens"
    write(
        f"kernels_{options.device}",
        rows,
        public,
        f"Attention kernels, {what}; {'median' if gpu else 'best'} of {options.runs} runs, seed {options.seed}",
    )


if __name__ == "__main__":
    main()
