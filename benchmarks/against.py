"""Is a session slower than at an older commit? Both versions act on one pipeline in one process.

    git worktree add --detach ../old COMMIT
    taskset -c 1 python benchmarks/against.py ../old [--pairs 150]

The time of a network drowns a difference of half a millisecond, so the network's forward is
replaced by one multiplication: what is left is the pipeline and the session. A pair is the
smallest processor time of three calls of either version, in random order; the ratio is that of a
whole session of the 6.8 M U-Net, timed once without replacement.
"""

from __future__ import annotations

import functools
import gc
import random
import statistics
import sys
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import numpy as np
import torch

STEPS, CALLS = 20, 3
NAME = "StableDiffusionPipeline"


def version(tree: Path) -> Any:
    """``diffalign`` of a checkout; other versions stay usable by whoever holds them."""
    for name in [name for name in sys.modules if name.split(".")[0] == "diffalign"]:
        del sys.modules[name]
    sys.path.insert(0, str(tree))
    import diffalign

    sys.path.remove(str(tree))
    return diffalign


def seconds(package: Any, pipe: Any, call: dict[str, Any]) -> float:
    """Processor seconds of one call in a session; entering it is not timed."""
    with package.apply(pipe, package.CFG()):
        start = time.process_time()
        pipe(**call)
        return time.process_time() - start


def without_network(cls: type) -> None:
    """Replace the forward of a denoiser's class."""
    real = cls.forward  # type: ignore[attr-defined]

    @functools.wraps(real)
    def forward(self: Any, sample: Any, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        return (sample * 0.5,)

    cls.forward = forward  # type: ignore[attr-defined]


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path, help="a checkout of the older commit")
    parser.add_argument("--pairs", type=int, default=150)
    options = parser.parse_args()
    torch.set_num_threads(1)
    del sys.path[0]  # transformers would take kernels.py of this folder for a package
    old = version(options.old.resolve())
    from diffalign.testing.tiny import tiny_inputs, tiny_pipeline, tiny_unet_pipeline

    calls = {
        batch: {**tiny_inputs(NAME, batch=batch, steps=STEPS), "guidance_scale": 4.0}
        for batch in (1, 2, 8)
    }
    large, tiny = tiny_unet_pipeline(5_000_000), tiny_pipeline(NAME)
    for pipe in (large, tiny):
        pipe.set_progress_bar_config(disable=True)
    seconds(old, tiny, calls[1])
    new = version(Path(__file__).resolve().parents[1])
    seconds(new, tiny, calls[1])
    whole = {
        b: statistics.median(seconds(new, large, c) for _ in range(5)) for b, c in calls.items()
    }
    without_network(type(tiny.unet))
    gc.collect()
    gc.disable()
    for batch, call in calls.items():
        differences = []
        for _ in range(options.pairs):
            order = [new, old] * CALLS
            random.shuffle(order)
            times: dict[bool, list[float]] = {True: [], False: []}
            for package in order:
                times[package is new].append(
                    seconds(package, tiny, {**call, "output_type": "latent"})
                )
            differences.append(min(times[True]) - min(times[False]))
        draws = np.random.default_rng(0).choice(differences, (4000, options.pairs))
        low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
        middle = statistics.median(differences)
        numbers = (middle, low, high)
        more = "{:+.2f} ms [{:+.2f}, {:+.2f}]".format(*(1000 * value for value in numbers))
        ratio = "{:.4f} [{:.4f}, {:.4f}]".format(*(1 + value / whole[batch] for value in numbers))
        print(f"B = {batch}: {more} of {1000 * whole[batch]:.0f} ms, ratio {ratio}")
        gc.collect()


if __name__ == "__main__":
    main()
