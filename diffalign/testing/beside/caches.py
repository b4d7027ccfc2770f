"""Feature caches of diffusers, which compute some steps from earlier ones.

Each is tested as it caches always, where it is told what to reuse by the step alone, and as it
never does, where every technique must be as without it. A cache of another package is one more
entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

from diffalign.core.types import Pipeline
from diffalign.testing.beside.base import (
    STEPS,
    Arguments,
    Neighbour,
    Refusal,
    by_name,
    by_seam,
    nothing,
)

FLUX, WAN = "FluxPipeline", "WanPipeline"
COGVIDEO, LTX, QWEN = "CogVideoXPipeline", "LTXPipeline", "QwenImagePipeline"
EVERYWHERE = (-1, 1001)
NEVER = (2000, 2001)
Config = Callable[[Pipeline], object]


@contextmanager
def cached(pipe: Pipeline, config: Config) -> Iterator[Arguments]:
    """The denoiser with a cache of that configuration."""
    pipe.transformer.enable_cache(config(pipe))
    try:
        yield nothing
    finally:
        pipe.transformer.disable_cache()


@contextmanager
def uncached(pipe: Pipeline) -> Iterator[Arguments]:
    """The denoiser as it is."""
    yield nothing


def first_block(pipe: Pipeline, threshold: float) -> FirstBlockCacheConfig:
    """Reuses what follows the first block while that changes by less than ``threshold``."""
    return FirstBlockCacheConfig(threshold=threshold)


def taylor_seer(pipe: Pipeline, interval: int) -> TaylorSeerCacheConfig:
    """Computes one step of ``interval`` and extrapolates the others."""
    return TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=1,
        max_order=1,
        taylor_factors_dtype=torch.float32,
    )


def magnitude(pipe: Pipeline, threshold: float) -> MagCacheConfig:
    """Skips steps by ratios measured before."""
    return MagCacheConfig(
        threshold=threshold,
        max_skip_steps=1,
        retention_ratio=0.2,
        num_inference_steps=STEPS,
        mag_ratios=[1.0] * STEPS,
    )


def pyramid(pipe: Pipeline, times: tuple[int, int]) -> PyramidAttentionBroadcastConfig:
    """Reuses attention outputs at every other step."""
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=3,
        spatial_attention_timestep_skip_range=times,
        cross_attention_timestep_skip_range=times,
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def faster(pipe: Pipeline, times: tuple[int, int]) -> FasterCacheConfig:
    """Reuses attention outputs, and estimates the unconditional rows at some steps."""
    return FasterCacheConfig(
        spatial_attention_timestep_skip_range=times,
        attention_weight_callback=lambda _: 0.3,
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=times,
        current_timestep_callback=lambda: pipe.current_timestep,
    )


LEFT_OUT = Refusal(by_seam("tokens"), "a step cache of the denoiser")
GROUP = "Feature caches"
PERTURBED = "it hands attention outputs of one pass to the next"
FASTER = "FasterCacheConfig cannot be combined with attention"
NEIGHBOURS = [
    Neighbour(
        name="FirstBlockCache",
        group=GROUP,
        pipelines=(FLUX, WAN, LTX, COGVIDEO, QWEN),
        put=partial(cached, config=partial(first_block, threshold=1e9)),
        branches=False,
        remembers=True,
        refusals=(LEFT_OUT,),
    ),
    Neighbour(
        name="FirstBlockCache that never reuses",
        group=GROUP,
        pipelines=(FLUX, WAN, LTX, COGVIDEO),
        put=partial(cached, config=partial(first_block, threshold=0.0)),
        without=uncached,
        branches=False,
        refusals=(LEFT_OUT,),
    ),
    Neighbour(
        name="TaylorSeer",
        group=GROUP,
        pipelines=(FLUX, WAN, LTX, COGVIDEO),
        put=partial(cached, config=partial(taylor_seer, interval=2)),
        branches=False,
        remembers=True,
        refusals=(LEFT_OUT,),
    ),
    Neighbour(
        name="TaylorSeer that never reuses",
        group=GROUP,
        pipelines=(FLUX, WAN, COGVIDEO),
        put=partial(cached, config=partial(taylor_seer, interval=1)),
        without=uncached,
        branches=False,
        refusals=(LEFT_OUT,),
    ),
    Neighbour(
        name="MagCache",
        group=GROUP,
        pipelines=(FLUX, WAN, LTX, COGVIDEO),
        put=partial(cached, config=partial(magnitude, threshold=1e9)),
        branches=False,
        remembers=True,
        refusals=(LEFT_OUT,),
    ),
    Neighbour(
        name="MagCache that never reuses",
        group=GROUP,
        pipelines=(FLUX, WAN, COGVIDEO),
        put=partial(cached, config=partial(magnitude, threshold=-1.0)),
        without=uncached,
        branches=False,
        refusals=(LEFT_OUT,),
    ),
    Neighbour(
        name="PyramidAttentionBroadcast",
        group=GROUP,
        pipelines=(COGVIDEO, LTX, WAN, FLUX),
        put=partial(cached, config=partial(pyramid, times=EVERYWHERE)),
        branches=False,
        remembers=True,
        refusals=(
            LEFT_OUT,
            Refusal(
                lambda name, cls: name == "nag",
                "it hands attention outputs of one branch to the other",
                (FLUX,),
            ),
            Refusal(by_name("pag", "seg"), PERTURBED),
        ),
    ),
    Neighbour(
        name="PyramidAttentionBroadcast that never reuses",
        group=GROUP,
        pipelines=(COGVIDEO, LTX, WAN),
        put=partial(cached, config=partial(pyramid, times=NEVER)),
        without=uncached,
        branches=False,
        refusals=(LEFT_OUT, Refusal(by_name("pag", "seg"), PERTURBED)),
    ),
    Neighbour(
        name="FasterCache",
        group=GROUP,
        pipelines=(COGVIDEO,),
        put=partial(cached, config=partial(faster, times=EVERYWHERE)),
        branches=False,
        remembers=True,
        refusals=(
            LEFT_OUT,
            Refusal(by_seam("attention"), FASTER),
            Refusal(by_name("pag", "seg"), FASTER),
            Refusal(by_name("auto-guidance"), "which this guidance does not run"),
        ),
    ),
]
