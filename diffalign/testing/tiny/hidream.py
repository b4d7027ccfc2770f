"""HiDream-I1: joint attention over an image and states of two text encoders, some of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
)
from torch import Tensor, nn

from diffalign.testing.tiny.base import Draw, Hook, Inputs, Request, Rigid, register
from diffalign.testing.tiny.parts import image_vae

SIZE, POOLED, T5, LLAMA, LAYERS = 16, 16, 12, 20, 5
TEXTS = [f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3", "_4")]


def _build(request: Request) -> Any:
    depth = 2 if request.variant == "deep" else 1
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=depth,
        num_single_layers=depth,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[T5, LLAMA],
        text_emb_dim=POOLED,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(SIZE // 2, SIZE // 2),
        llama_layers=[0, 2, 3, 4][: 2 * depth],
    )
    pipe = HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(4, shift_factor=0.1),
        transformer=transformer,
        **dict.fromkeys(TEXTS),
    )
    pipe.default_sample_size = SIZE // 2  # the pipeline scales every image to this area
    return pipe


def _inputs(request: Request, draw: Draw) -> Inputs:
    b = request.batch
    return {
        "guidance_scale": 3.0,
        "height": SIZE,
        "width": SIZE,
        "prompt_embeds_t5": draw.normal("t5", b, 6, T5),
        "prompt_embeds_llama3": draw.normal("llama", LAYERS, b, 7, LLAMA),
        "pooled_prompt_embeds": draw.normal("pooled", b, POOLED),
        "negative_prompt_embeds_t5": draw.normal("negative t5", b, 6, T5),
        "negative_prompt_embeds_llama3": draw.normal("negative llama", LAYERS, b, 7, LLAMA),
        "negative_pooled_prompt_embeds": draw.normal("negative pooled", b, POOLED),
    }


def _image(tensor: Tensor, call: Mapping[str, Any], row: int) -> slice:
    text = call["encoder_hidden_states_t5"].shape[1]
    text += 2 * call["encoder_hidden_states_llama3"].shape[2]
    return slice(0, tensor.shape[1] - text)


class Nothing(nn.Module):
    """Stands for a block that is not there: every layer has its own states of the text."""

    def __init__(self, single: bool) -> None:
        super().__init__()
        self.single = single

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **rest: Any
    ) -> Any:
        return hidden_states if self.single else (hidden_states, encoder_hidden_states)


register(
    ["HiDreamImagePipeline"],
    _build,
    _inputs,
    variants=("", "deep"),
    hooks=(
        Hook(r"double_stream_blocks\.\d+\.block\.attn1", inner="to_out"),
        Hook(r"single_stream_blocks\.\d+\.block\.attn1", inner="to_out", image=_image),
    ),
    deep="deep",
    rigid=Rigid(depth=(), absent=lambda stack: Nothing(single=stack.startswith("single"))),
)
