"""Tiny models that several families share: autoencoders, text encoders, a tokenizer."""

from __future__ import annotations

from diffusers import AutoencoderKL
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from diffalign.core.types import Keywords


def image_vae(channels: int = 4, **config: object) -> AutoencoderKL:
    """A KL autoencoder of factor 2: ``[B, 3, H, W]`` to ``[B, channels, H/2, W/2]``."""
    options: Keywords = {"scaling_factor": 0.5, "sample_size": 16} | config
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        **options,
    )


def clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose tokens are single bytes, with and without the end-of-word mark: any
    string works, in 77 tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [
        chr(256 + n) for n in range(256 - len(printable))
    ]  # the byte alphabet of GPT-2
    tokens = [
        "<|startoftext|>",
        "<|endoftext|>",
        *letters,
        *(letter + "</w>" for letter in letters),
    ]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77
    )


def _clip_config(width: int, projection: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def clip_text(width: int = 16) -> CLIPTextModel:
    """Two layers; hidden states ``[B, 77, width]``."""
    return CLIPTextModel(_clip_config(width, width))


def clip_text_projected(width: int = 16, projection: int = 16) -> CLIPTextModelWithProjection:
    """As ``clip_text`` with a pooled output ``[B, projection]``."""
    return CLIPTextModelWithProjection(_clip_config(width, projection))


def clip_vision(width: int = 16) -> CLIPVisionModel:
    """Two layers over a 16 x 16 image in 4 patches; hidden states ``[B, 5, width]``."""
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
    )


def clip_images() -> CLIPImageProcessor:
    """Preprocessing for ``clip_vision``; takes tensors in [0, 1]."""
    return CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, do_rescale=False
    )
