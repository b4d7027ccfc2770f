"""Real pipelines of diffusers whose denoiser is the formula of a Gaussian mixture.

``mixture_pipeline`` gives Stable Diffusion (noise or velocity predicted) or Stable Diffusion 3 (a
flow) with one latent pixel of D channels and a decoder that only paints: channel ``d`` is a stripe
of the picture. Everything else is the pipeline's own code: scheduler, loop, text, generators. All
is float64, so what comes out can be compared with ``Chain`` and ``Exact`` to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

from diffalign.core.types import Pipeline
from diffalign.testing.mixtures import Chain, Function, Mixture
from diffalign.testing.search import SPAN
from diffalign.testing.tiny import tiny_pipeline

Kind = Literal["eps", "v", "flow"]
# pixels of one latent pixel along an edge
FACTOR = 8


class MixtureUNet(UNet2DConditionModel):  # type: ignore[misc]  # diffusers has no types
    """The exact denoiser of a variance-preserving model; takes [B, D, 1, 1]."""

    mixture: Mixture
    # [train timesteps] noise levels sqrt((1 - abar) / abar), float64
    table: Tensor
    kind: Kind = "eps"

    def forward(
        self, sample: Tensor, timestep: Tensor | float, *args: object, **options: object
    ) -> tuple[Tensor]:
        time = torch.as_tensor(timestep).double().reshape(-1)
        low = time.floor().long().clamp(max=len(self.table) - 2)
        sigma = torch.lerp(self.table[low], self.table[low + 1], time - low)
        alpha = (1 + sigma * sigma).rsqrt()
        s = sigma * alpha
        x = sample.flatten(1)
        x0 = self.mixture.clean(x, alpha, s)
        eps = (x - alpha[:, None] * x0) / s[:, None]
        value = eps if self.kind == "eps" else alpha[:, None] * eps - s[:, None] * x0
        return (value.view_as(sample),)


class MixtureTransformer(SD3Transformer2DModel):  # type: ignore[misc]
    """The exact velocity of a flow; takes [B, D, 1, 1]."""

    mixture: Mixture

    def forward(
        self, hidden_states: Tensor, *args: object, timestep: Tensor, **options: object
    ) -> tuple[Tensor]:
        sigma = timestep.double().reshape(-1) / 1000
        x = hidden_states.flatten(1)
        x0 = self.mixture.clean(x, 1 - sigma, sigma)
        return (((x - x0) / sigma[:, None]).view_as(hidden_states),)


class StripeVAE(AutoencoderKL):  # type: ignore[misc]
    """A decoder that paints each channel of a latent pixel as a stripe."""

    def decode(self, z: Tensor, *args: object, **options: object) -> tuple[Tensor]:
        rows = z[:, :, 0, 0] / SPAN
        stripes = rows.repeat_interleave(FACTOR // rows.shape[1], dim=1)
        return (stripes[:, None, None].expand(-1, 3, FACTOR, -1),)


def _vae(size: int) -> StripeVAE:
    vae = StripeVAE(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=1,
        latent_channels=size,
        scaling_factor=1.0,
        shift_factor=0.0,
        sample_size=FACTOR,
    )
    return vae.double().eval()  # type: ignore[no-any-return]


def mixture_pipeline(mixture: Mixture, kind: Kind = "eps", scheduler: Pipeline = None) -> Pipeline:
    """A pipeline that samples the mixture; ``D`` must divide 8. Call with ``guidance_scale=1``.

    "eps" and "v" are a ``StableDiffusionPipeline`` that takes prompts, with DDIM unless
    ``scheduler`` says otherwise; "flow" is a ``StableDiffusion3Pipeline`` that takes embeddings.
    """
    with torch.random.fork_rng(devices=[]):
        build = _flow if kind == "flow" else _variance_preserving
        pipe = build(mixture, kind, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _variance_preserving(mixture: Mixture, kind: Kind, scheduler: Pipeline) -> Pipeline:
    if scheduler is None:
        prediction = "epsilon" if kind == "eps" else "v_prediction"
        scheduler = DDIMScheduler(clip_sample=False, prediction_type=prediction)
    unet = MixtureUNet(
        sample_size=1,
        in_channels=mixture.size,
        out_channels=mixture.size,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        block_out_channels=(4,),
        layers_per_block=1,
        norm_num_groups=1,
        cross_attention_dim=32,
    ).double()
    bars = scheduler.alphas_cumprod.double()
    unet.mixture, unet.kind, unet.table = mixture, kind, ((1 - bars) / bars).sqrt()
    tiny = tiny_pipeline("StableDiffusionPipeline", text=True)
    return StableDiffusionPipeline(
        vae=_vae(mixture.size),
        text_encoder=tiny.text_encoder.double(),
        tokenizer=tiny.tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _flow(mixture: Mixture, kind: Kind, scheduler: Pipeline) -> Pipeline:
    transformer = MixtureTransformer(
        sample_size=1,
        patch_size=1,
        in_channels=mixture.size,
        out_channels=mixture.size,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=1,
        joint_attention_dim=8,
        caption_projection_dim=4,
        pooled_projection_dim=8,
        pos_embed_max_size=1,
    ).double()
    transformer.mixture = mixture
    texts = [f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")]
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(),
        vae=_vae(mixture.size),
        **dict.fromkeys(texts),
    )


def embeddings(pipe: Pipeline) -> dict[str, Tensor]:
    """What a "flow" pipeline takes in place of a prompt."""
    width = pipe.transformer.config
    return {
        "prompt_embeds": torch.zeros(1, 1, width.joint_attention_dim, dtype=torch.float64),
        "pooled_prompt_embeds": torch.zeros(1, width.pooled_projection_dim, dtype=torch.float64),
    }


def chain_of(pipe: Pipeline, steps: int, eta: float) -> Chain:
    """The chain that the pipeline's scheduler runs: DDIM's timesteps, or a flow's sigmas."""
    pipe.scheduler.set_timesteps(steps)
    if hasattr(pipe, "transformer"):
        return Chain.flow([float(sigma) for sigma in pipe.scheduler.sigmas[:-1]], eta)
    bars = pipe.scheduler.alphas_cumprod
    return Chain.vp([float(bars[int(t)]) for t in pipe.scheduler.timesteps], eta)


class StripeReward:
    """A reward of pictures that is a function of the points [B, D] that their stripes show."""

    differentiable = True
    name = "stripes"

    def __init__(self, function: Function, size: int = 1) -> None:
        self.function, self.size = function, size

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        points = images[:, 0, 0, :: images.shape[-1] // self.size]
        return self.function((points - 0.5) * (2 * SPAN))
