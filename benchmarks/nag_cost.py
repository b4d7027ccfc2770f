"""What does NAG cost beside a plain step? Called by attention.py.

Floating-point operations are those of one step of the published models at 1024 x 1024, counted on
shapes alone. Seconds are processor seconds on one thread of models with a quarter of the tokens and
of the channels, whose parts have the same shares in the whole; each is beside plain steps of the
same round. The floor is a step whose guided row reads both texts as if they were one prompt.

The authors' figures are those of their code on models of other sizes, counted and timed elsewhere.
Their layout is counted here: two whole attentions of the image, one with each text, and on Flux a
second image stream in the single blocks.
"""

from __future__ import annotations

import functools
import random
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from results import Row, save
from rich.progress import track
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import diffalign as da
from diffalign.seams.attention.dense import Dense
from diffalign.testing.tiny.parts import image_vae

ALWAYS = (0.0, float("inf"))
# latents per side of an image of 1024 x 1024
SIDE = 128


@dataclass(frozen=True, slots=True)
class Size:
    """``part``: 1 for the published model, 4 for a quarter of its tokens and channels. ``depth``:
    the share of its blocks is one in so many."""

    part: int = 1
    depth: int = 1

    @property
    def pixels(self) -> int:
        """Of the call, with a VAE that halves each side."""
        return 2 * SIDE // (2 if self.part == 4 else 1)

    @property
    def device(self) -> torch.device:
        """Of the denoiser: without values where shapes are enough."""
        return torch.device("meta" if self.part == 1 else "cpu")


def text(label: int, tokens: int, channels: int, size: Size) -> Tensor:
    """Embeddings [1, L, E] of a text."""
    rng = torch.Generator().manual_seed(label)
    return torch.randn(1, max(1, tokens // size.part), channels // size.part, generator=rng)


def sdxl(size: Size) -> StableDiffusionXLPipeline:
    wide = [320 // size.part, 640 // size.part, 1280 // size.part]
    with size.device:
        unet = UNet2DConditionModel(
            sample_size=SIDE,
            block_out_channels=wide,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2 if size.depth == 1 else 1,
            transformer_layers_per_block=[1, max(1, 2 // size.depth), max(1, 10 // size.depth)],
            attention_head_dim=[5, 10, 20],
            norm_num_groups=16,
            cross_attention_dim=2048 // size.part,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256 // size.part,
            projection_class_embeddings_input_dim=2816 // size.part,
        )
    none = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return StableDiffusionXLPipeline(
        unet=unet, vae=image_vae(4), scheduler=EulerDiscreteScheduler(), **none
    )


def sd3(size: Size) -> StableDiffusion3Pipeline:
    with size.device:
        transformer = SD3Transformer2DModel(
            sample_size=SIDE,
            num_layers=24 // size.depth,
            attention_head_dim=64,
            num_attention_heads=24 // size.part,
            joint_attention_dim=4096 // size.part,
            caption_projection_dim=1536 // size.part,
            pooled_projection_dim=2048 // size.part,
            pos_embed_max_size=192,
        )
    none = dict.fromkeys(f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in EXTRA)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        vae=image_vae(16, shift_factor=0.1),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **none,
    )


EXTRA = ("", "_2", "_3")


def flux(size: Size) -> FluxPipeline:
    with size.device:
        transformer = FluxTransformer2DModel(
            num_layers=19 // size.depth,
            num_single_layers=38 // size.depth,
            num_attention_heads=24 // size.part,
            joint_attention_dim=4096 // size.part,
            pooled_projection_dim=768 // size.part,
            guidance_embeds=True,
        )
    none = dict.fromkeys(f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in EXTRA[:2])
    return FluxPipeline(
        transformer=transformer,
        vae=image_vae(16, shift_factor=0.1),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **none,
    )


@dataclass(frozen=True, slots=True)
class Model:
    """A published model."""

    build: Callable[[Size], Any]
    # tokens and channels of its text, channels of its pooled text
    tokens: int
    channels: int
    pooled: int
    # whether a plain step has both branches
    guided: bool = True

    def inputs(self, size: Size, copies: int = 1, guided: bool | None = None) -> dict[str, Any]:
        """Arguments of a call; ``copies``: how many times as long the prompt is."""
        guided = self.guided if guided is None else guided
        names = ["", "negative_"] if self.guided else [""]
        call: dict[str, Any] = {
            f"{name}prompt_embeds": text(i, copies * self.tokens, self.channels, size)
            for i, name in enumerate(names)
        }
        pooled = {
            f"{name}pooled_prompt_embeds": text(2 + i, size.part, self.pooled, size)[:, 0]
            for i, name in enumerate(names)
        }
        scale = {"guidance_scale": 5.0 if guided else 1.0} if self.guided else {}
        sides = {"height": size.pixels, "width": size.pixels}
        return call | pooled | scale | sides | {"num_inference_steps": 1, "output_type": "latent"}

    def negative(self, size: Size) -> dict[str, Tensor]:
        """A negative text of NAG's own."""
        return {
            "negative_prompt_embeds": text(7, self.tokens, self.channels, size),
            "negative_pooled_prompt_embeds": text(8, size.part, self.pooled, size)[:, 0],
        }


MODELS = {
    "SDXL": Model(sdxl, 77, 2048, 1280),
    "SD3 medium": Model(sd3, 333, 4096, 2048),
    "Flux.1": Model(flux, 512, 4096, 768, guided=False),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One way of running NAG. ``authors``: (operations, seconds) of their code beside plain."""

    model: str
    layout: str
    options: Mapping[str, Any]
    authors: tuple[float | None, float | None]
    # whether NAG takes the negative text of the call
    borrows: bool = False

    def technique(self, size: Size) -> da.NAG:
        embeds = None if self.borrows else MODELS[self.model].negative(size)
        return da.NAG(5.0, sigma=ALWAYS, negative_embeds=embeds, **self.options)


CASES = (
    Case("SDXL", "CFG's negative text", {}, (1.021, None), borrows=True),
    Case("SDXL", "a text of its own", {}, (1.021, None)),
    Case("SD3 medium", "a text of its own", {}, (1.233, 1.27)),
    Case("Flux.1", "one image stream", {}, (1.811, None)),
    Case("Flux.1", "share_image=False", {"share_image": False}, (1.811, None)),
)
COLUMNS = {
    "plain TFLOP": "operations of a plain step, both branches where the model has them",
    "operations": "beside the plain step",
    "floor": "operations of the floor beside the plain step",
    "authors' layout": "operations of the authors' layout beside the plain step",
    "authors": "operations of the authors' code beside its plain step",
    "seconds ratio": "processor seconds beside the plain step, median over rounds",
    "floor seconds": "processor seconds of the floor beside the plain step",
    "authors' seconds": "seconds of the authors' code beside its plain step",
}


@contextmanager
def two_attentions() -> Iterator[None]:
    """Within the block, nothing that two texts could share is shared."""
    shared = Dense.part
    Dense.part = lambda *_: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Dense.part = shared  # type: ignore[method-assign]


def layout(case: Case) -> float:
    """Operations of the authors' layout in the place of ``case``."""
    size, model = Size(), MODELS[case.model]
    embeds = model.negative(size)
    split = {"share_image": False} if case.model == "Flux.1" else {}
    theirs = da.NAG(5.0, sigma=ALWAYS, negative_embeds=embeds, **split)
    with two_attentions():
        return operations(step(built(case.model, size), model.inputs(size), theirs))


def on_meta(denoiser: nn.Module) -> None:
    """A denoiser without values: its arguments become shapes, its result zeros."""

    def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return tuple(map(shape, args)), {name: shape(value) for name, value in kwargs.items()}

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        return tuple(torch.zeros_like(x, device="cpu", dtype=torch.float32) for x in output)

    denoiser.register_forward_pre_hook(enter, with_kwargs=True)
    denoiser.register_forward_hook(leave)


def shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        dtype = torch.bfloat16 if value.is_floating_point() else value.dtype
        return torch.empty_like(value, device="meta", dtype=dtype)
    if isinstance(value, dict):
        return {name: shape(item) for name, item in value.items()}
    return value


def denoiser_of(pipe: Any) -> nn.Module:
    module: nn.Module = getattr(pipe, "unet", None) or pipe.transformer
    return module


@functools.cache
def built(name: str, size: Size) -> Any:
    """A pipeline with random weights, without any where only shapes are needed."""
    torch.manual_seed(0)
    pipe = MODELS[name].build(size)
    if size.part == 1:
        denoiser_of(pipe).to(torch.bfloat16)
        on_meta(denoiser_of(pipe))
        type(pipe)._execution_device = torch.device("cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def step(pipe: Any, call: Mapping[str, Any], *techniques: Any) -> Callable[[], Any]:
    """One step, to be run."""

    def run() -> None:
        rng = torch.Generator().manual_seed(0)
        if not techniques:
            pipe(**call, generator=rng)
            return
        with da.apply(pipe, *techniques):
            pipe(**call, generator=rng)

    return run


def operations(run: Callable[[], Any]) -> float:
    """Floating-point operations of a run."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def seconds(run: Callable[[], Any]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def floor(name: str, size: Size, measure: Callable[[Callable[[], Any]], float]) -> float:
    """A row that reads both texts as one prompt, and a plain row where there are two branches."""
    model, pipe = MODELS[name], built(name, size)
    guided = measure(step(pipe, model.inputs(size, copies=2, guided=False)))
    if not model.guided:
        return guided
    return guided + measure(step(pipe, model.inputs(size, guided=False)))


def timed(options: Namespace) -> dict[tuple[str, str], list[float]]:
    """(model, what ran) -> seconds, round by round."""
    size = Size(part=4, depth=12 if options.quick else 1)
    runs: dict[tuple[str, str], Callable[[], float]] = {}
    for name, model in MODELS.items():
        plain = step(built(name, size), model.inputs(size))
        runs[name, "plain"] = functools.partial(seconds, plain)
        runs[name, "floor"] = functools.partial(floor, name, size, seconds)
    for case in CASES:
        call = MODELS[case.model].inputs(size)
        run = step(built(case.model, size), call, case.technique(size))
        runs[case.model, case.layout] = functools.partial(seconds, run)
    found: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    order, rng = list(runs), random.Random(0)
    for number in track(range(options.rounds + 1), description="rounds"):
        rng.shuffle(order)
        for key in order:
            value = runs[key]()
            if number:  # the first warms up
                found[key].append(value)
    return found


def study(options: Namespace) -> None:
    """Count, time and save."""
    torch.set_num_threads(1)
    whole = Size()
    plain = {
        name: operations(step(built(name, whole), m.inputs(whole))) for name, m in MODELS.items()
    }
    least = {name: floor(name, whole, operations) for name in MODELS}
    times = timed(options)

    def ratio(model: str, what: str) -> float:
        pairs = zip(times[model, what], times[model, "plain"], strict=True)
        return statistics.median(a / b for a, b in pairs)

    rows: list[Row] = []
    for case in CASES:
        name, pipe = case.model, built(case.model, whole)
        ours = operations(step(pipe, MODELS[name].inputs(whole), case.technique(whole)))
        rows.append(
            {
                "model": name,
                "layout": case.layout,
                "plain TFLOP": plain[name] / 1e12,
                "operations": ours / plain[name],
                "floor": least[name] / plain[name],
                "authors' layout": layout(case) / plain[name],
                "authors": case.authors[0],
                "seconds ratio": ratio(name, case.layout),
                "floor seconds": ratio(name, "floor"),
                "authors' seconds": case.authors[1],
            }
        )
    save("nag_cost", rows, options, COLUMNS)
