"""How long do the attention kernels take beside the published eager form, torch.compile of the
short form, and plain attention?

    python benchmarks/kernels.py [--runs 50] [--dtype bfloat16] [--no-compile] [--seed 0] [--output
    benchmarks/results]

On a GPU: milliseconds at the shapes of SDXL, SD3-medium, Flux.1 and Wan 2.1, with a cold L2 cache,
without the host's launches. On a CPU: ratios of the paths that run there, in float32 and with a
sixteenth of the image tokens; they say nothing about a GPU. ``compiled`` is torch.compile in its
default mode. The title of the table says which of the two was run. Every form is compared with the
float64 truth on its first rows before it is timed, and a form whose error is out of bounds stops
the run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

import entmax
import torch
from results import save
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
COLUMNS = {
    "... ms": "milliseconds",
    "... / published": "ratio of times",
    "error ...": "largest error beside float64, over the largest true value",
}
CPU_SHARE = 16  # a CPU gets this fraction of the image tokens
CHECKED = 64  # image tokens that are compared with the float64 truth
AHEAD = 4_000_000  # clock cycles, 2 ms
L2_BYTES = 256 << 20  # several times the largest L2 cache there is


class Layer(NamedTuple):
    """A layer where image meets text.

    ``joint``: its image queries see the image too, and PLADIS acts on the text keys alone.
    """

    heads: int
    size: int
    image: int
    text: int
    joint: bool = False


LAYERS = {
    "SDXL 64x64": Layer(10, 64, 4096, 77),
    "SDXL 32x32": Layer(20, 64, 1024, 77),
    "PixArt-Sigma": Layer(16, 72, 4096, 300),
    "SD3-medium": Layer(24, 64, 4096, 333, joint=True),
    "Flux.1": Layer(24, 128, 4096, 512, joint=True),
    "Wan 1.3B 81 frames": Layer(12, 128, 32760, 512),
    "Wan 14B 81 frames": Layer(40, 128, 32760, 512),
}


def published_nag(z_pos: Tensor, z_neg: Tensor) -> Tensor:
    """The steps of the published code in its order: the norms are expanded to full size before
    ratio, minimum and division."""
    guided = z_pos * NAG["scale"] - z_neg * (NAG["scale"] - 1)
    size = torch.norm(z_pos, p=1, dim=-1, keepdim=True).expand(*z_pos.shape)
    grown = torch.norm(guided, p=1, dim=-1, keepdim=True).expand(*z_pos.shape)
    ratio = grown / size
    guided = guided * torch.minimum(ratio, ratio.new_full((1,), NAG["tau"])) / ratio
    return guided * NAG["alpha"] + z_pos * (1 - NAG["alpha"])


def published_pladis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores, softmax and the sorting entmax of the ``entmax`` package in the model's dtype, one
    product with the values."""
    z = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    dense = z.softmax(-1)
    return (dense + STRENGTH * (entmax.entmax15(z, -1) - dense)) @ v


def timer(gpu: bool) -> Callable[[Callable[[], Any]], float]:
    """A function that gives one call's milliseconds, by events on a GPU and by the wall clock on a
    CPU."""
    if not gpu:

        def wall(call: Callable[[], Any]) -> float:
            started = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - started)

        return wall

    spoil = torch.empty(L2_BYTES, dtype=torch.int8, device="cuda")

    def events(call: Callable[[], Any]) -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        spoil.zero_()  # empties the cache
        torch.cuda._sleep(
            AHEAD
            # and the GPU waits while the host launches all that is timed, so that no form pays for
            # its launches
        )
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop))

    return events


def clocked(forms: dict[str, Callable[[], Any]], runs: int, gpu: bool) -> dict[str, float]:
    """Milliseconds per form: median on a GPU, best on a CPU that others may use too. Forms take
    turns, so that drift hits all of them."""
    clock = timer(gpu)
    times: dict[str, list[float]] = {name: [] for name in forms}
    for call in forms.values():  # compiles and warms up
        for _ in range(3):
            call()
    for _ in range(runs):
        for name, call in forms.items():
            times[name].append(clock(call))
    return {
        name: statistics.median(values) if gpu else min(values) for name, values in times.items()
    }


def measure(
    forms: dict[str, Callable[[], Tensor]], true: Tensor, spread: float, options: argparse.Namespace
) -> dict[str, Any]:
    """Times (GPU) or ratios to ``published`` (CPU) of all forms, and the largest errors of the
    published and the chosen form.

    Our forms may err by the rounding of the weights and of the result, ``eps / 2 (spread +
    |true|)`` with ``spread`` the largest ``sum |w| |v|``, plus 1e-5 of the result for float32
    arithmetic.
    """
    rows, errors = true.shape[-2], {}
    size = float(true.abs().max())
    for name, call in forms.items():
        if name != "sdpa":
            got = call()[..., :rows, :]
            errors[name] = float((got.double() - true).abs().max())
            bound = torch.finfo(got.dtype).eps / 2 * (spread + size) + 1e-5 * size
            if name != "published" and not errors[name] <= bound:
                raise SystemExit(
                    f"{name} is wrong: error {errors[name]:.2e}, bound {bound:.2e}. No time is "
                    "reported."
                )
    times = clocked(forms, options.runs, options.gpu)
    if options.gpu:
        row: dict[str, Any] = {f"{name} ms": value for name, value in times.items()}
    else:
        row = {
            f"{name} / published": value / times["published"]
            for name, value in times.items()
            if name != "published"
        }
    ours = "triton" if "triton" in forms else "torch"
    return {
        **row,
        "error published": errors["published"] / size,
        f"error {ours}": errors[ours] / size,
    }


def operands(
    layer: Layer, keys: int, options: argparse.Namespace, rng: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [1, heads, tokens, size] in the memory layout of the processors."""
    parts = ((layer.image, 2.0), (keys, 1.0), (keys, 1.0))
    draws = (
        torch.randn(1, n, layer.heads, layer.size, generator=rng, device=rng.device) * std
        for n, std in parts
    )
    q, k, v = (t.to(options.torch_dtype).transpose(1, 2) for t in draws)
    return q, k, v


def nag_row(
    model: str, layer: Layer, options: argparse.Namespace, rng: torch.Generator
) -> dict[str, Any]:
    """The epilogue; ``sdpa`` is one of the two attentions whose results it blends."""
    keys = layer.text + layer.image * layer.joint
    q, k, v = operands(layer, keys, options, rng)
    shape = (1, layer.image, layer.heads * layer.size)
    pos, neg = (
        torch.randn(shape, generator=rng, device=rng.device).to(options.torch_dtype)
        for _ in range(2)
    )
    forms: dict[str, Callable[[], Tensor]] = {
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v),
        "published": lambda: published_nag(pos, neg),
        "torch": lambda: nag.nag(pos, neg, **NAG),
    }
    if options.compile:
        short = torch.compile(lambda p, n: nag.nag(p, n, **NAG), dynamic=False)
        forms["compiled"] = lambda: short(pos, neg)
    choice = nag.choose(pos)
    if choice.call is not nag.nag:
        forms["triton"] = lambda: choice.call(pos, neg, **NAG)
    true = nag.nag(pos[:, :CHECKED].double(), neg[:, :CHECKED].double(), **NAG)
    found = measure(forms, true, 0.0, options)
    if options.gpu:
        best = min(found[f"{name} ms"] for name in forms if name != "sdpa")
        found["GB/s at 3 sweeps, best"] = 3 * pos.numel() * pos.element_size() / best / 1e6
    return {
        "kernel": "NAG epilogue",
        "model": model,
        "shape": f"{shape[1]} x {shape[2]}",
        **found,
        "chosen": choice.reason,
    }


def pladis_row(
    model: str, layer: Layer, options: argparse.Namespace, rng: torch.Generator
) -> dict[str, Any]:
    """The whole attention to the text keys; ``sdpa`` is the plain attention to the same keys."""
    q, k, v = operands(layer, layer.text, options, rng)
    forms: dict[str, Callable[[], Tensor]] = {
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v),
        "published": lambda: published_pladis(q, k, v),
        "torch": lambda: pladis.pladis(q, k, v, strength=STRENGTH),
    }
    if options.compile:
        short = torch.compile(
            lambda q, k, v: pladis.pladis(q, k, v, strength=STRENGTH), dynamic=False
        )
        forms["compiled"] = lambda: short(q, k, v)
    choice = pladis.choose(q, k)
    if choice.call is not pladis.pladis:
        forms["triton"] = lambda: choice.call(q, k, v, strength=STRENGTH)
    true = pladis_naive.pladis(
        q[:, :, :CHECKED].double(), k.double(), v.double(), strength=STRENGTH
    )
    found = measure(forms, true, (2 * STRENGTH - 1) * float(v.abs().max()), options)
    shape = f"{layer.image} x {layer.text} keys, {layer.heads} x {layer.size}"
    return {"kernel": "PLADIS", "model": model, "shape": shape, **found, "chosen": choice.reason}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16"),
        default="bfloat16",
        help="on a GPU; a CPU runs float32",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--share",
        type=int,
        help=f"divide the image tokens by this; default 1 on a GPU, {CPU_SHARE} on a CPU",
    )
    parser.add_argument("--output", default="benchmarks/results")
    options = parser.parse_args(arguments)
    gpu = options.device == "cuda"
    if options.runs < 1 or (options.share is not None and options.share < 1):
        parser.error(
            f"--runs and --share must be at least 1; got {options.runs} and {options.share}."
        )
    if gpu and not torch.cuda.is_available():
        parser.error(
            "--device cuda: torch sees no GPU here. Use --device cpu for the ratios of the paths "
            "that run there."
        )
    options.share = options.share or (1 if gpu else CPU_SHARE)
    options.dtype = options.dtype if gpu else "float32"
    public = argparse.Namespace(**vars(options))
    options.gpu, options.torch_dtype = gpu, getattr(torch, options.dtype)
    if not gpu:
        torch.set_num_threads(1)
    rng = torch.Generator(options.device).manual_seed(options.seed)
    with torch.no_grad():
        layers = {
            model: layer._replace(image=max(1, layer.image // options.share))
            for model, layer in LAYERS.items()
        }
        rows = [
            row(model, layer, options, rng)
            for row in (nag_row, pladis_row)
            for model, layer in layers.items()
        ]
    save(f"kernels_{options.device}", rows, public, COLUMNS)


if __name__ == "__main__":
    main()
