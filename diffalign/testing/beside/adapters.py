"""LoRA in its forms, IP-Adapters, textual inversion and FreeU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from diffusers.models.attention_processor import (
    IPAdapterAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
)
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterTimeImageProjection,
    MultiIPAdapterImageProjection,
)
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from peft import LoraConfig
from torch import Tensor

from diffalign.core.types import Keywords, Pipeline
from diffalign.testing.beside.base import (
    Arguments,
    Model,
    Neighbour,
    Part,
    denoiser_of,
    nothing,
)
from diffalign.testing.tiny.base import Draw, randomise

SD, SDXL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
SD3, FLUX, WAN = "StableDiffusion3Pipeline", "FluxPipeline", "WanPipeline"
PICTURE = 16  # values of one picture's embedding
DRAW = Draw(5, torch.float32)


@contextmanager
def lora(
    pipe: Pipeline,
    weights: Sequence[float] = (1.0,),
    fuse: bool = False,
    call_scale: float | None = None,
) -> Iterator[Arguments]:
    """As many adapters as ``weights``; ``call_scale`` is given with each call."""
    model = getattr(pipe, denoiser_of(pipe))
    names = [f"adapter_{index}" for index in range(len(weights))]
    with torch.random.fork_rng(devices=[]):
        for seed, name in enumerate(names):
            torch.manual_seed(seed)
            config = LoraConfig(
                r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False
            )
            model.add_adapter(config, adapter_name=name)
    model.set_adapters(names, list(weights))
    if fuse:
        model.fuse_lora()
    argument = "cross_attention_kwargs" if denoiser_of(pipe) == "unet" else "joint_attention_kwargs"
    further = {} if call_scale is None else {argument: {"scale": call_scale}}
    try:
        yield lambda part: dict(further)
    finally:
        if fuse:
            model.unfuse_lora()
        model.delete_adapters(names)


@contextmanager
def freeu(pipe: Pipeline) -> Iterator[Arguments]:
    """Scaled backbone and skip features of a U-Net."""
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    try:
        yield nothing
    finally:
        pipe.disable_freeu()


@contextmanager
def textual_inversion(pipe: Pipeline) -> Iterator[Arguments]:
    """A new word of two vectors in every prompt."""
    width = pipe.text_encoder.config.hidden_size
    words = {"<pattern>": DRAW.normal("word", 2, width)}
    pipe.load_textual_inversion(words, token="<pattern>")

    def arguments(part: Part) -> Keywords:
        prompt = [f"a red apple {image} <pattern>" for image in part.images]
        return {} if part.branch == "uncond" else {"prompt": prompt}

    try:
        yield arguments
    finally:
        pipe.unload_textual_inversion()


@contextmanager
def _kept(pipe: Pipeline, names: Sequence[str]) -> Iterator[Model]:
    """The denoiser, whose processors, attributes and configuration are put back."""
    model = getattr(pipe, denoiser_of(pipe))
    processors = dict(model.attn_processors)
    config = model.config
    before = {name: getattr(model, name, None) for name in names}
    absent = [name for name in names if name not in {**vars(model), **model._modules}]
    try:
        yield model
    finally:
        for name in names:  # the adapter's own layers go before their processors are counted
            setattr(model, name, before[name])
            if name in absent:
                delattr(model, name)
        model.set_attn_processor(processors)
        model._internal_dict = config


def _install(model: Model, new: Callable[[str, Model], Model | None]) -> None:
    """A new random processor wherever ``new`` makes one."""
    processors, rng = {}, torch.Generator().manual_seed(3)
    for key, old in model.attn_processors.items():
        processor = new(key, model.get_submodule(key.removesuffix(".processor")))
        processors[key] = old if processor is None else processor
        if processor is not None:
            randomise(processor, rng)
    model.set_attn_processor(processors)


def _pictures(adapters: int, count: int = 1, tokens: int = 1) -> dict[str, list[Tensor]]:
    """Embeddings of ``count`` pictures for every adapter, and of the negative ones.

    Pipelines repeat them for every image of the batch.
    """
    shape = (count, tokens, PICTURE)
    return {
        branch: [DRAW.normal(f"picture {branch} {i}", *shape) for i in range(adapters)]
        for branch in ("cond", "uncond")
    }


def _of_branches(pictures: dict[str, list[Tensor]], part: Part) -> list[Tensor]:
    """In the layout of U-Nets and SD3: the negative pictures first, where both branches run."""
    if part.branch != "both":
        return pictures[part.branch]
    return [torch.cat(pair) for pair in zip(pictures["uncond"], pictures["cond"])]


@contextmanager
def unet_pictures(
    pipe: Pipeline, count: int = 1, masks: bool = False, each: int = 1
) -> Iterator[Arguments]:
    """``count`` IP-Adapters of a U-Net, with ``each`` so many pictures.

    ``masks`` gives each adapter its half of the image.
    """
    tokens = (4,) * count
    pictures = _pictures(count, each)
    halves = torch.zeros(count, 1, 16, 16)
    halves[0, ..., :8] = 1.0
    if count > 1:
        halves[1, ..., 8:] = 1.0

    def new(key: str, layer: Model) -> Model | None:
        width = layer.to_q.in_features
        made = partial(IPAdapterAttnProcessor2_0, width, 32, num_tokens=tokens)
        return made(scale=[0.8] * count) if "attn2" in key else None

    def arguments(part: Part) -> Keywords:
        further: Keywords = {"ip_adapter_image_embeds": _of_branches(pictures, part)}
        if masks:
            further["cross_attention_kwargs"] = {"ip_adapter_masks": [h[None] for h in halves]}
        return further

    with _kept(pipe, ["encoder_hid_proj"]) as model:
        _install(model, new)
        projections = [ImageProjection(PICTURE, 32, 4) for _ in range(count)]
        for index, projection in enumerate(projections):
            randomise(projection, torch.Generator().manual_seed(index))
        model.encoder_hid_proj = MultiIPAdapterImageProjection(projections)
        model.register_to_config(encoder_hid_dim_type="ip_image_proj")
        yield arguments


@contextmanager
def sd3_pictures(pipe: Pipeline) -> Iterator[Arguments]:
    """The IP-Adapter of SD3, which reads the time too."""
    pictures = _pictures(1, tokens=5)
    config = pipe.transformer.config
    size = config.attention_head_dim * config.num_attention_heads

    def new(key: str, layer: Model) -> Model:
        return SD3IPAdapterJointAttnProcessor2_0(
            hidden_size=size,
            ip_hidden_states_dim=size,
            head_dim=config.attention_head_dim,
            timesteps_emb_dim=32,
        )

    with _kept(pipe, ["image_proj"]) as model:
        _install(model, new)
        model.image_proj = IPAdapterTimeImageProjection(
            PICTURE, size, 32, heads=2, dim_head=16, num_queries=5, timestep_in_dim=8
        )
        randomise(model.image_proj, torch.Generator().manual_seed(4))
        yield lambda part: {"ip_adapter_image_embeds": _of_branches(pictures, part)[0]}


@contextmanager
def flux_pictures(pipe: Pipeline, count: int = 1, each: int = 1) -> Iterator[Arguments]:
    """``count`` IP-Adapters of Flux, in its double blocks, with ``each`` so many pictures."""
    pictures, config = _pictures(count, each), pipe.transformer.config
    size = config.num_attention_heads * config.attention_head_dim

    def new(key: str, layer: Model) -> Model | None:
        tokens = (4,) * count
        made = partial(FluxIPAdapterAttnProcessor, size, size, num_tokens=tokens)
        return None if "single" in key else made(scale=[0.8] * count)

    def arguments(part: Part) -> Keywords:
        return {
            "ip_adapter_image_embeds": pictures["uncond" if part.branch == "uncond" else "cond"],
            "negative_ip_adapter_image_embeds": pictures["uncond"],
        }

    with _kept(pipe, ["encoder_hid_proj"]) as model:
        _install(model, new)
        projections = [ImageProjection(PICTURE, size, 4) for _ in range(count)]
        for index, projection in enumerate(projections):
            randomise(projection, torch.Generator().manual_seed(index))
        model.encoder_hid_proj = MultiIPAdapterImageProjection(projections)
        yield arguments


LORA = [
    Neighbour(
        name="LoRA, loaded",
        group="LoRA",
        pipelines=(SD, SDXL, SD3, FLUX, WAN),
        put=lora,
        without=partial(lora, fuse=True),
    ),
    Neighbour(
        name="LoRA, fused",
        group="LoRA",
        pipelines=(SD, SDXL, SD3, FLUX, WAN),
        put=partial(lora, fuse=True),
        without=lora,
    ),
    Neighbour(
        name="several LoRAs with weights",
        group="LoRA",
        pipelines=(SD, SDXL, SD3, FLUX, WAN),
        put=partial(lora, weights=(0.7, 0.4)),
        without=partial(lora, weights=(0.7, 0.4), fuse=True),
    ),
    Neighbour(
        name="LoRA, scale given to the call",
        group="LoRA",
        pipelines=(SD, SDXL),
        put=partial(lora, call_scale=0.5),
        without=partial(lora, weights=(0.5,), fuse=True),
        text=True,
    ),
    Neighbour(
        name="LoRA of a transformer, scale given to the call",
        group="LoRA",
        pipelines=(SD3, FLUX),
        put=partial(lora, call_scale=0.5),
        without=partial(lora, weights=(0.5,), fuse=True),
    ),
]
PICTURES = [
    Neighbour(
        name="IP-Adapter",
        group="IP-Adapters",
        pipelines=(SD, SDXL),
        put=unet_pictures,
        images=True,
    ),
    Neighbour(
        name="two IP-Adapters",
        group="IP-Adapters",
        pipelines=(SD, SDXL),
        put=partial(unet_pictures, count=2),
        images=True,
    ),
    Neighbour(
        name="two IP-Adapters with masks",
        group="IP-Adapters",
        pipelines=(SD, SDXL),
        put=partial(unet_pictures, count=2, masks=True),
        images=True,
    ),
    Neighbour(
        name="IP-Adapter with two pictures",
        group="IP-Adapters",
        pipelines=(SD, SDXL),
        put=partial(unet_pictures, each=2),
        images=True,
    ),
    Neighbour(
        name="IP-Adapter of SD3",
        group="IP-Adapters",
        pipelines=(SD3,),
        put=sd3_pictures,
        images=True,
    ),
    Neighbour(
        name="IP-Adapter of Flux",
        group="IP-Adapters",
        pipelines=(FLUX,),
        put=flux_pictures,
        images=True,
    ),
    Neighbour(
        name="two IP-Adapters of Flux",
        group="IP-Adapters",
        pipelines=(FLUX,),
        put=partial(flux_pictures, count=2),
        images=True,
    ),
    Neighbour(
        name="IP-Adapter of Flux with two pictures",
        group="IP-Adapters",
        pipelines=(FLUX,),
        put=partial(flux_pictures, each=2),
        images=True,
    ),
]
WORDS = [
    Neighbour(
        name="textual inversion",
        group="Words and features",
        pipelines=(SD,),
        put=textual_inversion,
        text=True,
    ),
    Neighbour(
        name="FreeU",
        group="Words and features",
        pipelines=(SD, SDXL),
        put=freeu,
    ),
]
NEIGHBOURS = [*LORA, *PICTURES, *WORDS]
