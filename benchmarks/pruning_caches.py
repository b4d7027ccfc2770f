"""How long does a run take with CAT, and with the step caches of diffusers? Called by pruning.py
with --caches.

A small network of Flux's form with random weights: time alone. A cache that decides by what it sees
decides otherwise on a trained model, so each is told how often to compute, and what it costs in
quality is not measured here. SeaCache is missing: it wants to be told the step and the noise level
of each call, which FluxPipeline does not do, and then computes everything.
"""

from __future__ import annotations

import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import (
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    MagCacheConfig,
    TaylorSeerCacheConfig,
)
from results import Row, save
from rich.progress import track
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import diffalign as da
from diffalign.core.types import Pipeline
from diffalign.testing.tiny.parts import image_vae

STEPS, WARM = 28, 8
TEXT, WIDTH = 64, 256
COLUMNS = {
    "seconds": "processor seconds of a run, median of rounds",
    "beside": "seconds beside those of the full run",
    "operations": "floating point operations beside those of the full run",
}


def network(side: int) -> tuple[Pipeline, dict[str, Any]]:
    """A pipeline of Flux's form with ``side`` x ``side`` image tokens, and a call without
    guidance."""
    heads = WIDTH // 64
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=64,
        num_attention_heads=heads,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(16, 24, 24),
    )
    none = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxPipeline(
        transformer=transformer,
        vae=image_vae(4, shift_factor=0.1),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **none,
    )
    pipe.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(0)
    return pipe, {
        "prompt_embeds": torch.randn(1, TEXT, WIDTH, generator=rng),
        "pooled_prompt_embeds": torch.randn(1, WIDTH, generator=rng),
        "height": 4 * side,  # the VAE and the patches halve each side
        "width": 4 * side,
        "num_inference_steps": STEPS,
        "output_type": "latent",
    }


@contextmanager
def caching(pipe: Pipeline, config: object | None, *techniques: Any) -> Iterator[None]:
    """A cache of diffusers, or techniques."""
    if config is not None:
        pipe.transformer.enable_cache(config)
    try:
        with da.apply(pipe, *techniques):
            yield
    finally:
        if config is not None:
            pipe.transformer.disable_cache()


def ways() -> dict[str, Callable[[Pipeline], Any]]:
    """Name -> what must be on around a run."""
    halved = {"max_skip_steps": 1, "retention_ratio": WARM / STEPS, "num_inference_steps": STEPS}
    taylor = {"cache_interval": 2, "disable_cache_before_step": WARM, "max_order": 1}
    configs: dict[str, Callable[[], object]] = {
        "FirstBlockCache, always": lambda: FirstBlockCacheConfig(threshold=1e9),
        "TaylorSeer, every other step": lambda: TaylorSeerCacheConfig(**taylor),
        "MagCache, every other step": lambda: MagCacheConfig(
            threshold=1e9, mag_ratios=[1.0] * STEPS, **halved
        ),
    }
    runs: dict[str, Callable[[Pipeline], Any]] = {"full": lambda pipe: caching(pipe, None)}
    for keep in (0.3, 0.5):
        technique = da.CAT(keep, start=WARM)
        runs[f"CAT {keep:g}"] = lambda pipe, t=technique: caching(pipe, None, t)
    for name, make in configs.items():
        runs[name] = lambda pipe, make=make: caching(pipe, make())
    return runs


def once(pipe: Pipeline, call: dict[str, Any], around: Any) -> float:
    """Processor seconds of a run."""
    with around:
        began = time.process_time()
        pipe(**call, generator=torch.Generator().manual_seed(0))
        return time.process_time() - began


def operations(pipe: Pipeline, call: dict[str, Any], around: Any) -> int:
    """Floating point operations of a run, with the form of attention that the counter sees."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        once(pipe, call, around)
    return int(counter.get_total_flops())


def study(options: Namespace) -> None:
    """Time every way, in turns, and save."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    for side in options.sides:
        pipe, call = network(side)
        runs = ways()
        work = {name: operations(pipe, call, around(pipe)) for name, around in runs.items()}
        figures: dict[str, list[float]] = {name: [] for name in runs}
        for number in track(range(options.rounds + 1), description=f"{side * side} tokens"):
            for name, around in runs.items():
                figure = once(pipe, call, around(pipe))
                if number:  # the first warms up
                    figures[name].append(figure)
        middle = {name: statistics.median(values) for name, values in figures.items()}
        for name in runs:
            rows.append(
                {
                    "method": name,
                    "tokens": side * side,
                    "seconds": middle[name],
                    "beside": middle[name] / middle["full"],
                    "operations": work[name] / work["full"],
                }
            )
    save("pruning_caches", rows, options, COLUMNS, {"steps": STEPS, "full steps": WARM})
