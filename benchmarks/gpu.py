"""What do sessions, techniques and kernels cost on a GPU?

    python benchmarks/gpu.py [--seconds 330] [--models SDXL ...] [--dtype bfloat16] [--runs 3]
                             [--no-compile] [--fresh] [--output benchmarks/results]
    python benchmarks/gpu.py --device cpu --tiny

At most six minutes on any CUDA machine. Kernels at the shapes of SDXL, SD3 medium, Flux.1 and Wan
2.1, each compared with float64 before it is timed; then steps of these models at their true width,
heads and number of tokens, with a few of their blocks and random weights: what is timed does not
depend on the weights. A row is written as soon as it is measured, nothing new begins that does not
fit into ``--seconds``, and a second run on the same machine measures what is missing. With
``--tiny`` models of a few kilobytes take their place: that shows that the path runs, and no time
means anything.
"""

from __future__ import annotations

import statistics
import sys
import time
from argparse import (
    ArgumentParser,
    BooleanOptionalAction,
    Namespace,
    RawDescriptionHelpFormatter,
)
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import kernels
import nag_cost
import pages
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.utils import logging
from results import Result, Row, environment, read, write
from torch import Tensor

import diffalign as da
from diffalign.kernels import selection, tokens
from diffalign.seams.tokens.memory import Places
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline

STEPS, EXTRA = 6, 2
"""Steps of a run; those of the first are not timed."""
BLOCKS = 12
"""One block of so many is there."""
KEEP = 0.3
COLUMNS = kernels.COLUMNS | {
    "ms per step": "milliseconds from the end of one step to that of the next, median",
    "beside": "ms per step beside the pipeline's own, compiled beside compiled",
    "GiB": "most that torch had allocated on the device",
    "bits": "whether the result is the pipeline's own, bit for bit",
    "acted": "layers or steps at which the technique acted",
}


@dataclass(frozen=True, slots=True)
class Place(nag_cost.Size):
    """A published model's size on a device, with few blocks."""

    where: str = "cpu"

    @property
    def device(self) -> torch.device:
        return torch.device(self.where)


def wan(size: nag_cost.Size) -> WanPipeline:
    """Wan 2.1 of 1.3 B."""
    with size.device:
        transformer = WanTransformer3DModel(
            num_attention_heads=12,
            attention_head_dim=128,
            text_dim=4096,
            ffn_dim=8960,
            num_layers=30 // size.depth,
        )
    vae = AutoencoderKLWan(
        base_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, transformer=transformer
    )


def wan_inputs(size: nag_cost.Size) -> dict[str, Any]:
    """81 frames of 832 x 480: 32,760 tokens."""
    embeds = [nag_cost.text(label, 512, 4096, size) for label in (0, 1)]
    video = {"height": 480, "width": 832, "num_frames": 81, "guidance_scale": 5.0}
    return video | dict(zip(("prompt_embeds", "negative_prompt_embeds"), embeds))


@dataclass(frozen=True, slots=True)
class Model:
    """A published model, and the class of which a tiny one is made."""

    tiny: str
    build: Callable[[nag_cost.Size], Any]
    inputs: Callable[[nag_cost.Size], dict[str, Any]]
    # techniques by the name of their row
    techniques: tuple[str, ...] = ("CFG", "NAG", "PLADIS")
    # whether plain guidance is there to compare with
    guided: bool = True


def _published(name: str) -> tuple[Callable[..., Any], Callable[..., dict[str, Any]]]:
    model = nag_cost.MODELS[name]
    return model.build, model.inputs


MODELS = {
    "SDXL": Model("StableDiffusionXLPipeline", *_published("SDXL")),
    "SD3 medium": Model(
        "StableDiffusion3Pipeline", *_published("SD3 medium"), ("CFG", "NAG", "PLADIS", "CAT")
    ),
    "Flux.1": Model("FluxPipeline", *_published("Flux.1"), ("NAG", "PLADIS", "CAT"), False),
    "Wan 2.1 1.3B": Model("WanPipeline", wan, wan_inputs),
}


def technique(name: str, model: str, options: Namespace) -> Any:
    """A technique that acts at every step, CAT from the second on."""
    if name == "CAT":
        return da.CAT(KEEP, start=EXTRA)
    if name != "NAG":
        return {"CFG": da.CFG, "PLADIS": da.PLADIS}[name]()
    embeds = None
    if not MODELS[model].guided and not options.tiny:
        embeds = on(nag_cost.MODELS[model].negative(size_of(options)), options)
    return da.NAG(4.0, sigma=nag_cost.ALWAYS, negative_embeds=embeds)


def size_of(options: Namespace) -> Place:
    return Place(depth=BLOCKS, where=options.device)


def on(call: dict[str, Any], options: Namespace) -> dict[str, Any]:
    """Arguments on the device, in the dtype of the run."""
    return {
        name: value.to(options.device, options.torch_dtype) if isinstance(value, Tensor) else value
        for name, value in call.items()
    }


@lru_cache(maxsize=1)
def built(model: str, device: str, dtype: torch.dtype, tiny: bool) -> Any:
    """The pipeline with random weights; only the last one stays."""
    if device == "cuda":
        torch.cuda.empty_cache()
    pipe = tiny_pipeline(MODELS[model].tiny) if tiny else None
    if pipe is None:
        torch.manual_seed(0)
        pipe = MODELS[model].build(Place(depth=BLOCKS, where=device))
    pipe.to(device, dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline(model: str, options: Namespace) -> Any:
    return built(model, options.device, options.torch_dtype, options.tiny)


def call_of(model: str, options: Namespace) -> dict[str, Any]:
    """Arguments of one run: the same noise each time."""
    if options.tiny:
        call = tiny_inputs(MODELS[model].tiny)
    else:
        call = MODELS[model].inputs(size_of(options))
    call |= {
        "num_inference_steps": STEPS,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }
    return on(call, options)


class Clock:
    """The times at which steps end; on a GPU by events, which wait for nothing."""

    def __init__(self, gpu: bool) -> None:
        self.gpu = gpu
        self.marks: list[Any] = []

    def __call__(self, pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> Any:
        """For ``callback_on_step_end``."""
        if self.gpu:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())
        return values

    def milliseconds(self) -> list[float]:
        """From each step's end to that of the next."""
        if self.gpu:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) for a, b in zip(self.marks, self.marks[1:])]
        return [1e3 * (b - a) for a, b in zip(self.marks, self.marks[1:])]


def run(pipe: Any, model: str, options: Namespace, *group: Any) -> tuple[Any, list[float], Any]:
    """Latents, milliseconds of the steps that count, and the report of a session."""
    clock = Clock(options.device == "cuda")
    call = call_of(model, options) | {"callback_on_step_end": clock}
    if not group:
        return pipe(**call)[0], clock.milliseconds()[EXTRA - 1 :], None
    with da.apply(pipe, *group) as session:
        latents = pipe(**call)[0]
        return latents, clock.milliseconds()[EXTRA - 1 :], session.report()


# (model, compiled) -> milliseconds of a plain step and its result
PLAIN: dict[tuple[str, bool], tuple[float, Any]] = {}


def plain(model: str, compiled: bool, options: Namespace) -> tuple[float, Any]:
    """What the pipeline itself takes and makes."""
    if (model, compiled) not in PLAIN:
        pipe = pipeline(model, options)
        run(pipe, model, options)
        times = [run(pipe, model, options) for _ in range(options.runs)]
        middle = statistics.median(ms for _, each, _ in times for ms in each)
        PLAIN[model, compiled] = middle, times[-1][0]
    return PLAIN[model, compiled]


def step_row(model: str, what: str, compiled: bool, options: Namespace) -> Row:
    """Steps with one technique, or of the plain pipeline."""
    pipe = pipeline(model, options)
    denoiser = nag_cost.denoiser_of(pipe)
    if compiled and denoiser._compiled_call_impl is None:
        torch._dynamo.reset()
        denoiser.compile(backend="eager" if options.tiny else "inductor")
    if not compiled:
        denoiser._compiled_call_impl = None
    beside, latents = plain(model, compiled, options)
    row: Row = {"ms per step": beside, "beside": 1.0}
    gpu = options.device == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    if what != "plain":
        group = technique(what, model, options)
        run(pipe, model, options, group)
        times = [run(pipe, model, options, group) for _ in range(options.runs)]
        middle = statistics.median(ms for _, each, _ in times for ms in each)
        row = {"ms per step": middle, "beside": middle / beside}
        report = times[-1][2]
        row["acted"] = ", ".join(f"{n} of {m} layers" for n, m in report.layers.values()) or None
        if what == "CFG":
            row["bits"] = "the same" if torch.equal(times[-1][0], latents) else "others"
    else:
        run(pipe, model, options)
    if gpu:
        row["GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def tokens_row(model: str, layer: kernels.Layer, options: Namespace, rng: torch.Generator) -> Row:
    """Keys and values of a step that leaves tokens out, written among those of all."""
    count, dtype = max(1, int(KEEP * layer.image)), options.torch_dtype
    shape = (2, layer.heads, layer.text + layer.image, layer.size)
    fresh = (2, layer.text + count, layer.heads, layer.size)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=rng, device=rng.device).to(dtype)

    k, v = (draw(*fresh).transpose(1, 2) for _ in range(2))
    buffers = [draw(*shape) for _ in range(2)]
    order = torch.rand(2, layer.image, generator=rng, device=rng.device).argsort(1)
    index = order[:, :count].sort(1).values
    eager = Places(index, layer.image).copied
    eager(*(x.clone() for x in buffers), k, v, index, text_first=True)  # makes its index once
    choice = tokens.choose(k, plain=eager)
    forms = {"torch": eager} | ({"triton": choice.call} if choice.call is not eager else {})
    true = [x.clone() for x in buffers]
    tokens.write(*true, k, v, index, text_first=True)
    for name, call in forms.items():
        ours = [x.clone() for x in buffers]
        call(*ours, k, v, index, text_first=True)
        if not all(torch.equal(a, b) for a, b in zip(ours, true)):
            raise SystemExit(f"{name} is wrong: the bits differ. No time is reported.")
    timed = {
        name: partial(call, *buffers, k, v, index, text_first=True) for name, call in forms.items()
    }
    times = kernels.clocked(timed, options.runs, options.gpu)
    return {
        "kernel": "tokens",
        "model": model,
        "shape": f"2 x {layer.text} + {count} of {layer.image}, {layer.heads} x {layer.size}",
        **{f"{name} ms": value for name, value in times.items()},
        "chosen": choice.reason,
    }


def selection_row(
    model: str, layer: kernels.Layer, options: Namespace, rng: torch.Generator
) -> Row:
    """The choice of a step's tokens: ranks in regions, the first of each, and the stalest."""
    tokens, regions, device = layer.image, 20, rng.device
    count = max(1, int(KEEP * tokens))
    values = torch.rand(2, tokens, generator=rng, device=device)
    labels = torch.randint(0, regions, (2, tokens), generator=rng, device=device)
    ages = torch.randint(0, 1 << 40, (2, tokens), generator=rng, device=device)

    def places(form: selection.Selection) -> list[Tensor]:
        keys = form.ranks(values, labels) * regions + labels
        return [form.smallest(keys, count // 4), form.smallest(ages, count)]

    choice = selection.choose(device, tokens)
    forms = {"torch": selection.PLAIN}
    forms |= {"triton": choice.call} if choice.call is not selection.PLAIN else {}
    true = places(selection.PLAIN)
    if not all(torch.equal(a, b) for a, b in zip(places(choice.call), true)):
        raise SystemExit("triton is wrong: the places differ. No time is reported.")
    timed = {name: partial(places, form) for name, form in forms.items()}
    times = kernels.clocked(timed, options.runs, options.gpu)
    return {
        "kernel": "selection",
        "model": model,
        "shape": f"2 x {count} of {tokens}, {regions} regions",
        **{f"{name} ms": value for name, value in times.items()},
        "chosen": choice.reason,
    }


def kernel_row(part: str, model: str, options: Namespace) -> Row:
    """One kernel at one shape."""
    rng = torch.Generator(options.device).manual_seed(0)
    layer = kernels.LAYERS[model]
    layer = layer._replace(image=max(1, layer.image // options.share))
    rows = {"NAG": kernels.nag_row, "PLADIS": kernels.pladis_row}
    row = (rows | {"tokens": tokens_row, "selection": selection_row})[part]
    settings = Namespace(**vars(options) | {"compile": False, "runs": options.kernel_runs})
    with torch.no_grad():
        return row(model, layer, settings, rng)


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the tables."""

    part: str
    model: str
    what: str
    # seconds that it may take
    need: float
    measure: Callable[[], Row]

    @property
    def key(self) -> Row:
        return {"part": self.part, "model": self.model, "what": self.what}


def cells(options: Namespace) -> Iterator[Cell]:
    """Everything, the quickest first."""
    for kernel in ("NAG", "PLADIS", "tokens", "selection"):
        for model, layer in kernels.LAYERS.items():
            if kernel in ("NAG", "PLADIS") or layer.joint:
                yield Cell(
                    "kernels", model, kernel, 10, partial(kernel_row, kernel, model, options)
                )
    for compiled in (False, True) if options.compile else (False,):
        for name in options.models:
            model = MODELS[name]
            for what in ("plain", *model.techniques):
                if compiled and what in ("PLADIS", "CAT"):
                    continue  # as many breaks of the graph as NAG
                yield Cell(
                    "compiled" if compiled else "eager",
                    name,
                    what,
                    60 if compiled else 15,
                    partial(step_row, name, what, compiled, options),
                )


def measure(cell: Cell) -> Row:
    """A row; what went wrong is one too."""
    try:
        return cell.key | cell.measure()
    except (Exception, SystemExit) as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        return cell.key | {"failed": words[:200]}


# what may differ between two runs whose rows stand in one table
FREE = ("command", "seconds", "models", "compile", "fresh", "output")


def earlier(path: Path, result: Result, fresh: bool) -> list[Row]:
    """Rows that an earlier run of the same options on the same machine has measured."""
    if fresh or not path.exists():
        return []
    before = read(path.stem, path.parent)

    def fixed(values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name not in FREE}

    parts = ("environment", "options")
    alike = all(fixed(getattr(before, part)) == fixed(getattr(result, part)) for part in parts)
    return [row for row in before.rows if "failed" not in row] if alike else []


def parsed(arguments: list[str] | None) -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=330.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--compile", action=BooleanOptionalAction, default=True)
    parser.add_argument("--tiny", action="store_true", help="models of a few kilobytes")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--output", default="benchmarks/results")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu --tiny shows that the path runs.")
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu needs --tiny: at true width a CPU takes hours.")
    if options.runs < 1 or not options.seconds > 0:
        parser.error(
            f"--runs and --seconds must be positive; got {options.runs}, {options.seconds}."
        )
    return options


def main(arguments: list[str] | None = None) -> int:
    began = time.perf_counter()
    options = parsed(arguments)
    options.dtype = options.dtype if options.device == "cuda" else "float32"
    public = dict(vars(options))
    options.gpu, options.torch_dtype = options.device == "cuda", getattr(torch, options.dtype)
    options.share, options.kernel_runs = (2048, 1) if options.tiny else (1, 20)
    logging.set_verbosity_error()  # of parts that a checkpoint would keep in float32
    PLAIN.clear()
    built.cache_clear()
    result = Result([], COLUMNS, {}, public, environment(options.device))
    path = Path(options.output) / f"gpu_{options.device}.json"
    rows = earlier(path, result, options.fresh)
    left_out = []
    for cell in cells(options):
        if any({**row, **cell.key} == row for row in rows):
            continue
        if time.perf_counter() - began + cell.need > options.seconds:
            left_out.append(cell.key)
            continue
        print(f"{time.perf_counter() - began:5.0f} s  {' '.join(cell.key.values())}", flush=True)
        rows.append(measure(cell))
        write(path, Result(rows, COLUMNS, {"left out": left_out}, public, result.environment))
    facts = {"left out": left_out, "took_s": time.perf_counter() - began}
    write(path, Result(rows, COLUMNS, facts, public, result.environment))
    print(pages.publish(path.stem, path.parent))
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
