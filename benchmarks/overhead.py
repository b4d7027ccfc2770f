"""What does a session cost? Plain CFG through a session against the pipeline's own CFG: equal
evaluations, paired, medians.

    python benchmarks/overhead.py [--runs 20] [--compile] [--output benchmarks/results]

The network of the first table has at least 5 M parameters; the per-family table uses networks of a
few kilobytes, where the session's fixed cost per step is all one sees, so it is given in
milliseconds per step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from results import command_line, save

import diffalign as da
from diffalign.families import FAMILIES
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline, tiny_unet_pipeline

COLUMNS = {
    "native_s": "wall seconds of a run",
    "session_s": "wall seconds of a run",
    "wall_ratio": "session / native",
    "cpu_ratio": "session / native, processor time",
    "cpu_ms_per_step": "processor milliseconds that the session adds to a step",
}
PIPELINES = [
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
    "PixArtSigmaPipeline",
    "SanaPipeline",
    "FluxPipeline",
    "QwenImagePipeline",
    "ChromaPipeline",
    "Lumina2Pipeline",
    "ZImagePipeline",
    "WanPipeline",
    "LTXPipeline",
    "CogVideoXPipeline",
    "DiTPipeline",
    "Cosmos2TextToImagePipeline",
]


def seconds(call: Callable[[], Any]) -> tuple[float, float]:
    """Wall and processor seconds; with one thread the second does not see what else the machine is
    doing."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def paired(pipe: Any, name: str, batch: int, steps: int, runs: int) -> dict[str, float]:
    """Median seconds of native and tapped runs, and medians of the paired ratios; the order
    alternates."""
    pipe.set_progress_bar_config(disable=True)
    gate = FAMILIES[name].gates[0]

    def call() -> None:
        pipe(**{**tiny_inputs(name, batch=batch, steps=steps), gate: 4.0})

    def tapped() -> tuple[float, float]:
        with da.apply(
            pipe, da.CFG()
        ):  # entering is not timed: it is paid once, whatever is drawn in the block
            return seconds(call)

    call()
    tapped()
    native: list[tuple[float, float]] = []
    ours: list[tuple[float, float]] = []
    for run in range(runs):
        for first in (True, False):
            if first == bool(run % 2):
                native.append(seconds(call))
            else:
                ours.append(tapped())
    middle = statistics.median
    return {
        "native_s": middle(wall for wall, _ in native),
        "session_s": middle(wall for wall, _ in ours),
        "wall_ratio": middle(b[0] / a[0] for a, b in zip(native, ours)),
        "cpu_ratio": middle(b[1] / a[1] for a, b in zip(native, ours)),
        "cpu_ms_per_step": 1000 * middle(b[1] - a[1] for a, b in zip(native, ours)) / steps,
    }


def main() -> None:
    parser = command_line(__doc__, runs=20, steps=20)
    parser.add_argument(
        "--compile", action="store_true", help="compile the denoiser of the large network as well"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for compiled in (False, True) if options.compile else (False,):
        for batch in (1, 2, 8):
            pipe = tiny_unet_pipeline(5_000_000)
            size = sum(p.numel() for p in pipe.unet.parameters())
            if compiled:
                torch._dynamo.reset()
                pipe.unet.compile()
            network = f"U-Net {size / 1e6:.1f} M" + (", compiled" if compiled else "")
            rows.append(
                {"network": network, "batch": batch}
                | paired(pipe, "StableDiffusionPipeline", batch, options.steps, options.runs)
            )
    for name in PIPELINES:
        for batch in (1, 2, 8):
            few = paired(tiny_pipeline(name), name, batch, 4, max(options.runs // 2, 3))
            rows.append({"network": f"tiny {name}", "batch": batch} | few)
    save("overhead", rows, options, COLUMNS)


if __name__ == "__main__":
    main()
