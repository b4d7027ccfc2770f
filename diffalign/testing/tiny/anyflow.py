"""AnyFlow-FAR: video made chunk after chunk, each behind a memory of the chunks before it."""

from __future__ import annotations

from diffusers import (
    AnyFlowFARPipeline,
    AnyFlowFARTransformer3DModel,
    FlowMapEulerDiscreteScheduler,
)
from transformers import UMT5Config, UMT5EncoderModel

from diffalign.core.types import Pipeline
from diffalign.testing.tiny.base import CROSS, Draw, Inputs, Request, register
from diffalign.testing.tiny.parts import clip_tokenizer
from diffalign.testing.tiny.wan import wan_vae

SIZE, TEXT, LATENT = 32, 24, 4
PARTITION = (1, 2, 1, 1)


def umt5_text(width: int = TEXT) -> UMT5EncoderModel:
    """One layer; hidden states ``[B, L, width]`` of the tokens of ``clip_tokenizer``."""
    return UMT5EncoderModel(
        UMT5Config(vocab_size=514, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )


def _build(request: Request) -> Pipeline:
    transformer = AnyFlowFARTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=LATENT,
        out_channels=LATENT,
        text_dim=TEXT,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        chunk_partition=PARTITION,
    )
    return AnyFlowFARPipeline(
        tokenizer=clip_tokenizer() if request.text else None,
        text_encoder=umt5_text() if request.text else None,
        transformer=transformer,
        vae=wan_vae(),
        scheduler=FlowMapEulerDiscreteScheduler(shift=3.0),
    )


def _inputs(request: Request, draw: Draw) -> Inputs:
    b = request.batch
    inputs: Inputs = {
        "guidance_scale": 3.0,
        "height": SIZE,
        "width": SIZE,
        "num_frames": 4 * (sum(PARTITION) - 1) + 1,
    }
    if request.text:
        return inputs | {"prompt": ["a dog moves left"] * b, "max_sequence_length": 20}
    return inputs | {
        "prompt_embeds": draw.normal("text", b, 7, TEXT),
        "negative_prompt_embeds": draw.normal("negative", b, 7, TEXT),
    }


# a model without a block remembers other keys, so that skipping is not deleting there
register(["AnyFlowFARPipeline"], _build, _inputs, text=True, hooks=CROSS, deep=None)
