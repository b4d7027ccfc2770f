"""Texts as the denoiser receives them: each family's own ``encode_prompt``, its results by name,
and the denoiser's names for them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from diffalign.core import UnsupportedModel
from diffalign.families.family import Argument, Family

# arguments of the pipeline call that change how a text is encoded
SAME = (
    "max_sequence_length",
    "clip_skip",
    "clean_caption",
    "system_prompt",
    "complex_human_instruction",
)
# arguments of the pipeline call whose "scale" is that of the LoRA, of the text encoders too
SCALES = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
PLAIN = ("prompt_embeds", "negative_prompt_embeds")
POOLED = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
)
MASKED = (
    "prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_embeds",
    "negative_prompt_attention_mask",
)


@dataclass(frozen=True, slots=True)
class Encoder:
    """How one family encodes texts.

    ``results``: names of what ``encode_prompt`` returns, as the pipeline call names them.
    ``arguments``: such a name, without "negative_", -> the denoiser argument it becomes.
    """

    results: tuple[str, ...]
    arguments: Mapping[str, str]

    def __call__(self, pipe: Any, texts: Sequence[str]) -> dict[str, Any]:
        """The denoiser's text arguments for prompts ``texts``, one row each: embeddings
        [len(texts), L, E], masks, pooled embeddings."""
        return self.denoiser(self.embeddings(pipe, texts))

    def embeddings(
        self,
        pipe: Any,
        texts: Sequence[str],
        *,
        negative: bool = False,
        call: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """``texts`` under the pipeline's own names without "negative_": ``prompt_embeds``, masks,
        pooled embeddings.

        ``negative``: encoded as the pipeline encodes negative prompts. ``call``: arguments of the
        pipeline call, for text lengths and the like; where it has none, the call's defaults hold.
        ``more``: other arguments of ``encode_prompt``.
        Cost: the text encoders run once, or twice where the pipeline encodes negative prompts only
        beside positive ones.
        Raises: ``UnsupportedModel`` without text encoders, or where texts are encoded together with
        an image.
        """
        if not has_text_encoder(pipe):
            raise UnsupportedModel(
                f"{type(pipe).__name__} has no text encoder loaded, so it cannot encode "
                f"{list(texts)!r}."
            )
        known = inspect.signature(pipe.encode_prompt).parameters
        if "image" in known:
            raise UnsupportedModel(
                f"{type(pipe).__name__} encodes a text together with its image. Encode "
                f"{list(texts)!r} with pipe.encode_prompt(image=..., "
                "prompt=...) and pass the embeddings and their mask: "
                "NAG(negative_embeds={'negative_prompt_embeds': ..., ...})."
            )
        both = negative and "negative_prompt" in known
        if negative and not both:  # there every text is encoded as a prompt
            more = {name.removeprefix("negative_"): value for name, value in more.items()}
        given: dict[str, Any] = {"prompt": list(texts), "device": pipe._execution_device}
        given |= {
            "num_images_per_prompt": 1,
            "num_videos_per_prompt": 1,
            "prompt_2": None,
            "prompt_3": None,
            **more,
        }
        defaults = {
            name: p.default
            for name, p in inspect.signature(type(pipe).__call__).parameters.items()
            if name in SAME
        }
        given |= defaults | {name: call[name] for name in SAME if call is not None and name in call}
        scales = [
            options["scale"]
            for name in SCALES
            if (options := (call or {}).get(name)) and "scale" in options
        ]
        given |= {"lora_scale": scales[0]} if scales else {}
        given |= {
            "do_classifier_free_guidance": both,
            **({"negative_prompt": list(texts)} if both else {}),
        }
        with torch.no_grad():
            made = pipe.encode_prompt(
                **{name: value for name, value in given.items() if name in known}
            )
        named = dict(zip(self.results, made, strict=True))
        prefix = "negative_" if both else ""
        return {name: named[prefix + name] for name in self.arguments if prefix + name in named}

    def denoiser(self, embeddings: Mapping[str, Any]) -> dict[str, Any]:
        """``embeddings`` under the denoiser's names."""
        return {
            self.arguments[name]: value
            for name, value in embeddings.items()
            if name in self.arguments and value is not None
        }


def has_text_encoder(pipe: Any) -> bool:
    """Whether any text encoder is loaded."""
    return any(
        getattr(pipe, name, None) is not None
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3")
    )


TEXT = {"prompt_embeds": "encoder_hidden_states"}
TEXT_POOLED = {**TEXT, "pooled_prompt_embeds": "pooled_projections"}
TEXT_MASKED = {**TEXT, "prompt_attention_mask": "encoder_attention_mask"}

ENCODERS: dict[str, Encoder] = {
    "sd": Encoder(PLAIN, TEXT),
    "sdxl": Encoder(
        POOLED, TEXT
    ),  # the pooled text goes into added_cond_kwargs, a dictionary of its own
    "kolors": Encoder(POOLED, TEXT),
    "sd3": Encoder(POOLED, TEXT_POOLED),
    "pixart": Encoder(MASKED, TEXT_MASKED),
    "sana": Encoder(MASKED, TEXT_MASKED),
    "ltx": Encoder(MASKED, TEXT_MASKED),
    "lumina2": Encoder(MASKED, TEXT_MASKED),
    "wan": Encoder(PLAIN, TEXT),
    "cogvideox": Encoder(PLAIN, TEXT),
    "cosmos2": Encoder(PLAIN, TEXT),
    "flux": Encoder(("prompt_embeds", "pooled_prompt_embeds", "text_ids"), TEXT_POOLED),
    "chroma": Encoder(
        (
            "prompt_embeds",
            "text_ids",
            "prompt_attention_mask",
            "negative_prompt_embeds",
            "negative_ids",
            "negative_prompt_attention_mask",
        ),
        {**TEXT, "prompt_attention_mask": "attention_mask"},
    ),
    "qwen": Encoder(
        ("prompt_embeds", "prompt_embeds_mask"),
        {**TEXT, "prompt_embeds_mask": "encoder_hidden_states_mask"},
    ),
    "z-image": Encoder(PLAIN, {"prompt_embeds": "cap_feats"}),
}

# families whose text argument is not a plain ``encoder_hidden_states`` [B, L, E]
ARGUMENTS: dict[str, tuple[Argument, ...]] = {
    **dict.fromkeys(
        ("pixart", "sana", "ltx", "lumina2"),
        (Argument("encoder_hidden_states", mask="encoder_attention_mask"),),
    ),
    "qwen": (Argument("encoder_hidden_states", mask="encoder_hidden_states_mask"),),
    "chroma": (
        Argument("encoder_hidden_states", mask="attention_mask"),
    ),  # the mask goes on over the image tokens
    "z-image": (Argument("cap_feats", axis=0),),  # a list with one [L, E] per row
    "dit": (),
}


def with_text(family: Family) -> Family:
    """``family`` with its text arguments and its encoder."""
    return replace(
        family, text=ARGUMENTS.get(family.name, family.text), encode=ENCODERS.get(family.name)
    )
