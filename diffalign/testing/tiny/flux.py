"""Flux.1 (embedded guidance and true CFG, separate calls) and Chroma (plain CFG, masked text)."""

from __future__ import annotations

import diffusers
from diffusers import (
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxTransformer2DModel,
)
from torch import Tensor, nn

from diffalign.core.types import Keywords, Pipeline
from diffalign.testing.tiny.base import Draw, Hook, Inputs, Request, Rigid, behind_text, register
from diffalign.testing.tiny.parts import image_vae

SIZE, TEXT, POOLED = 16, 32, 16
CFG = [
    f"Flux{kind}Pipeline"
    for kind in ("", "Img2Img", "Inpaint", "ControlNet", "Kontext", "KontextInpaint")
]
EMBEDDED = [
    f"Flux{kind}Pipeline"
    for kind in (
        "ControlNetImg2Img",
        "ControlNetInpaint",
        "Fill",
        "Control",
        "ControlImg2Img",
        "ControlInpaint",
    )
]
CHROMA = [f"Chroma{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint")]


def _build(request: Request) -> Pipeline:
    shape: Keywords = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT,
        "axes_dims_rope": (4, 4, 8),
    }
    parts: Keywords = {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": image_vae(4, shift_factor=0.1),
        "text_encoder": None,
        "tokenizer": None,
    }
    if request.has("Chroma"):
        parts["transformer"] = ChromaTransformer2DModel(
            **shape, approximator_num_channels=16, approximator_hidden_dim=16, approximator_layers=1
        )
        parts["transformer"].register_to_config(
            guidance_embeds=False
        )  # ChromaInpaintPipeline reads it
    else:
        shape |= {"pooled_projection_dim": POOLED, "guidance_embeds": request.variant != "schnell"}
        # Fill also reads the masked image and a pixel mask, Control the control image
        wide = {"FluxFillPipeline": 16 + 16 + 4 * 4} | dict.fromkeys(EMBEDDED[3:], 32)
        parts |= {"text_encoder_2": None, "tokenizer_2": None}
        parts["transformer"] = FluxTransformer2DModel(
            **shape | {"in_channels": wide.get(request.name, 16), "out_channels": 16}
        )
        if request.has("ControlNet"):
            parts["controlnet"] = FluxControlNetModel(**shape)
    return getattr(diffusers, request.name)(**parts)


def _pictures(request: Request, draw: Draw) -> Inputs:
    b = request.batch
    inputs: Inputs = {"height": SIZE, "width": SIZE}
    if request.has("Img2Img", "Inpaint", "Kontext", "Fill"):
        inputs["image"] = draw.image("image", b, 3, SIZE, SIZE)
    if request.has("Img2Img", "Inpaint"):
        inputs["strength"] = 0.75
    if request.has("Inpaint", "Fill"):
        inputs["mask_image"] = draw.mask(b, 1, SIZE, SIZE)
    if request.has("Control"):
        inputs["control_image"] = draw.image("control", b, 3, SIZE, SIZE)
    if request.has("Kontext"):
        inputs |= {"max_area": SIZE * SIZE, "_auto_resize": False}
    return inputs


def _flux(request: Request, draw: Draw) -> Inputs:
    b = request.batch
    inputs: Inputs = {
        "guidance_scale": 3.5,
        "prompt_embeds": draw.normal("text", b, 7, TEXT),
        "pooled_prompt_embeds": draw.normal("pooled", b, POOLED),
    }
    if request.name in CFG and not request.variant:
        inputs |= {
            "true_cfg_scale": 3.0,
            "negative_prompt_embeds": draw.normal("negative", b, 7, TEXT),
            "negative_pooled_prompt_embeds": draw.normal("negative pooled", b, POOLED),
        }
    return inputs | _pictures(request, draw)


def _chroma(request: Request, draw: Draw) -> Inputs:
    b, short = (
        request.batch,
        7 if request.has("Inpaint") else 5,
    )  # the inpainting class wants equal lengths
    inputs: Inputs = {
        "guidance_scale": 3.0,
        "prompt_embeds": draw.normal("text", b, 7, TEXT),
        "prompt_attention_mask": draw.ones(b, 7, pad=1, dtype=request.dtype),
        "negative_prompt_embeds": draw.normal("negative", b, short, TEXT),
        "negative_prompt_attention_mask": draw.ones(b, short, pad=2, dtype=request.dtype),
    }
    return inputs | _pictures(request, draw)


class Nothing(nn.Module):
    """Stands for a block of Chroma that is not there."""

    def __init__(self, single: bool) -> None:
        super().__init__()
        self.single = single

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **rest: object
    ) -> Tensor | tuple[Tensor | None, Tensor]:
        return hidden_states if self.single else (encoder_hidden_states, hidden_states)


HOOKS = (
    Hook(r"transformer_blocks\.\d+\.attn"),
    Hook(r"single_transformer_blocks\.\d+\.attn", inner="", image=behind_text),
)
# one network makes the modulation of all blocks of Chroma
RIGID = Rigid(
    depth=("num_layers", "num_single_layers"),
    absent=lambda stack: Nothing(single=stack.startswith("single")),
)
register(CFG, _build, _flux, variants=("", "embedded", "schnell"), hooks=HOOKS)
register(EMBEDDED, _build, _flux, hooks=HOOKS)
register(CHROMA, _build, _chroma, hooks=HOOKS, rigid=RIGID)
