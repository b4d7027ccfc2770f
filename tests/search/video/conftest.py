"""Tiny pipelines that extend videos, each built once for a file of tests."""

import pytest


def _assembled(pipe):
    import torch
    from torch import nn

    from diffalign.testing.tiny.base import randomise

    for label, part in sorted(pipe.components.items()):
        if isinstance(part, nn.Module):
            randomise(part, torch.Generator().manual_seed(len(label)))
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def anyflow():
    from diffalign.testing.tiny import tiny_pipeline

    return tiny_pipeline("AnyFlowFARPipeline")


@pytest.fixture(scope="module")
def helios():
    from diffusers import HeliosPipeline, HeliosScheduler, HeliosTransformer3DModel

    from diffalign.testing.tiny.wan import wan_vae

    transformer = HeliosTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_dim=(4, 4, 4),
    )
    return _assembled(
        HeliosPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=wan_vae(),
            scheduler=HeliosScheduler(stages=1, stage_range=[0, 1]),
            transformer=transformer,
        )
    )


@pytest.fixture(scope="module")
def skyreels():
    from diffusers import (
        SkyReelsV2DiffusionForcingVideoToVideoPipeline,
        SkyReelsV2Transformer3DModel,
        UniPCMultistepScheduler,
    )

    from diffalign.testing.tiny.wan import wan_vae

    transformer = SkyReelsV2Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )
    return _assembled(
        SkyReelsV2DiffusionForcingVideoToVideoPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=wan_vae(),
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
            transformer=transformer,
        )
    )


@pytest.fixture(scope="module")
def text():
    """Embeddings of a prompt and of a negative prompt, as the call takes them."""
    import torch

    rng = torch.Generator().manual_seed(0)
    names = ("prompt_embeds", "negative_prompt_embeds")
    return {name: torch.randn(1, 7, 24, generator=rng) for name in names}
