"""HiDream-I1: text of two encoders behind the image in one attention, branches in one batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffalign.core.attention import Parts
from diffalign.families.arithmetic import negated
from diffalign.families.family import IMAGE, TEXT, Family
from diffalign.families.text import Argument, Encoder, SecondText, TextLayers, always

T5, LLAMA = "encoder_hidden_states_t5", "encoder_hidden_states_llama3"


def row_parts(denoiser: Any, call: Mapping[str, Any]) -> tuple[Parts, ...]:
    """Image, T5, the last and the layer's own states of the language model; all rows are alike."""
    height, width = call["hidden_states"].shape[-2:]
    patch = denoiser.config.patch_size
    # images that are not square are padded to the longest sequence
    image = (height // patch) * (width // patch) if height == width else denoiser.max_seq
    text = call[T5].shape[1] + 2 * call[LLAMA].shape[2]
    parts = {"prompt": slice(image, image + text), "image": slice(0, image)}
    return (parts,) * len(call["hidden_states"])


HIDREAM = Family(
    "hidream",
    live_scale=True,
    pipelines=("HiDreamImagePipeline",),
    to_step=negated,
    target_sign=-1,
    text=(Argument(T5), Argument(LLAMA, axis=2, rows=1)),
    encoder=Encoder(
        (
            "prompt_embeds_t5",
            "negative_prompt_embeds_t5",
            "prompt_embeds_llama3",
            "negative_prompt_embeds_llama3",
            "pooled_prompt_embeds",
            "negative_pooled_prompt_embeds",
        ),
        {
            "prompt_embeds_t5": T5,
            "prompt_embeds_llama3": LLAMA,
            "pooled_prompt_embeds": "pooled_embeds",
        },
    ),
    attention=TextLayers(
        r"(double|single)_stream_blocks\.\d+\.block\.attn1",
        "joint",
        text="last",
        row_parts=row_parts,
    ),
    # each layer puts states of its own between the texts
    second_text=SecondText(in_rows=always),
    blocks={
        "HiDreamImageTransformerBlock": (IMAGE, TEXT),
        "HiDreamImageSingleTransformerBlock": (IMAGE,),
    },
)
