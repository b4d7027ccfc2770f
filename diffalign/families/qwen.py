"""Qwen-Image: numbered text before the image in one attention; two calls, guided rows renormed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from diffalign.families.arithmetic import first_tokens, per_thousand, renorm
from diffalign.families.family import IMAGE, TEXT, Family, PipelineOption
from diffalign.families.layout import Grid, TokenPlaces, first_table
from diffalign.families.text import Argument, Encoder, SecondText, TextLayers


def restart_positions(
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    prompt: int,
    second: int,
) -> tuple[Any, Any]:
    """Rotary rows of image and text: the second text counts from where the prompt does."""
    import torch

    image, text = call(*args, **{**kwargs, "max_txt_seq_len": max(prompt, second)})
    return image, torch.cat([text[:prompt], text[:second]])


def grid(denoiser: Any, arguments: Mapping[str, Any]) -> Grid:
    """The image that is made; the shapes of the references follow its own."""
    frames, height, width = arguments["img_shapes"][0][0]
    return frames, height, width


def image_tokens(arguments: Mapping[str, Any]) -> slice:
    """Tokens of the image that is made."""
    frames, height, width = arguments["img_shapes"][0][0]
    return slice(0, frames * height * width)


QWEN = Family(
    "qwen",
    pipelines=(
        "QwenImagePipeline",
        "QwenImageImg2ImgPipeline",
        "QwenImageInpaintPipeline",
        "QwenImageControlNetPipeline",
        "QwenImageControlNetInpaintPipeline",
    ),
    modular=("QwenImageModularPipeline",),
    mode="sequential",
    gates=("true_cfg_scale",),
    needs_negative=True,
    time=per_thousand,
    packed=True,
    grid=grid,
    # no argument of the call: it always renorms
    options=(PipelineOption("cfg_renorm", True, post=renorm),),
    text=(Argument("encoder_hidden_states", mask="encoder_hidden_states_mask"),),
    encoder=Encoder(
        ("prompt_embeds", "prompt_embeds_mask"),
        {
            "prompt_embeds": "encoder_hidden_states",
            "prompt_embeds_mask": "encoder_hidden_states_mask",
        },
    ),
    attention=TextLayers(r"transformer_blocks\.\d+\.attn", "joint"),
    tokens=TokenPlaces(
        embed="img_in",
        out="proj_out",
        image=r"transformer_blocks\.\d+\.(attn\.to_(?!add).*|img_mlp\..*)|proj_out",
        text=r"transformer_blocks\.\d+\.(attn\.(add_|to_add).*|txt_mlp\..*)",
        rotary={"image_rotary_emb": first_table},
    ),
    second_text=SecondText(around={"pos_embed": restart_positions}),
    blocks={"QwenImageTransformerBlock": (TEXT, IMAGE)},
    refusals={
        "cfg-zero-star/zero_steps": (
            "the pipeline divides each prediction by its norm, and a still step has none. Pass "
            "zero_steps=0."
        )
    },
)
EDIT = replace(
    QWEN,
    pipelines=("QwenImageEditPipeline", "QwenImageEditPlusPipeline"),
    modular=(),
    to_step=first_tokens,
    seen=image_tokens,
    tokens=None,
    refusals={
        **QWEN.refusals,
        "cat": "its tokens are those of the image and of references, and which of them may be left "
        "out is not known.",
    },
)
