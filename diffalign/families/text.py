"""How texts reach a denoiser: the family's encoder, its text arguments and its text layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from diffalign.core import UnsupportedModel
from diffalign.core.attention import Parts

# arguments of the pipeline call that change how a text is encoded
ENCODING = (
    "max_sequence_length",
    "prompt_template",
    "clip_skip",
    "clean_caption",
    "system_prompt",
    "complex_human_instruction",
)
# arguments of the pipeline call whose "scale" is that of the LoRA, of the text encoders too
LORA_OPTIONS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")

# results of encode_prompt in the families that agree on them, as the pipeline call names them
PLAIN = ("prompt_embeds", "negative_prompt_embeds")
POOLED = (*PLAIN, "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
MASKED = (
    "prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_embeds",
    "negative_prompt_attention_mask",
)
# the denoiser arguments that they become
TEXT = {"prompt_embeds": "encoder_hidden_states"}
TEXT_POOLED = {**TEXT, "pooled_prompt_embeds": "pooled_projections"}
TEXT_MASKED = {**TEXT, "prompt_attention_mask": "encoder_attention_mask"}


@dataclass(frozen=True, slots=True)
class Argument:
    """A text argument of the denoiser."""

    name: str
    # axis of the text tokens; 0 for a list with a tensor per row
    axis: int = 1
    # argument with the mask of its tokens
    mask: str | None = None
    # argument with the positions of its tokens [L, 3], which are zeros
    positions: str | None = None
    # axis of its rows
    rows: int = 0


HIDDEN = (Argument("encoder_hidden_states"),)
HIDDEN_MASKED = (Argument("encoder_hidden_states", mask="encoder_attention_mask"),)


@dataclass(frozen=True, slots=True)
class Encoder:
    """How a family encodes texts: by the pipeline's own ``encode_prompt``."""

    # what encode_prompt returns, by the names of the pipeline call
    results: tuple[str, ...] = PLAIN
    # such a name, without "negative_" -> the denoiser argument it becomes
    arguments: Mapping[str, str] = field(default_factory=lambda: TEXT)

    @property
    def first(self) -> str:
        """The call argument with the text that attention sees first."""
        return next(iter(self.arguments))

    def __call__(self, pipe: Any, texts: Sequence[str]) -> dict[str, Any]:
        """The denoiser's text arguments for prompts ``texts``, a row each: embeddings
        [len(texts), L, E], masks, pooled embeddings."""
        return self.denoiser(self.embeddings(pipe, texts))

    def embeddings(
        self,
        pipe: Any,
        texts: Sequence[str],
        *,
        negative: bool = False,
        call: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> dict[str, Any]:
        """Texts encoded, under the pipeline's names without "negative_".

        ``negative``: encoded as the pipeline encodes negative prompts. ``call``: arguments of the
        pipeline call, for text lengths and the like; where it has none, the call's defaults hold.
        ``others``: further arguments of ``encode_prompt``.
        Cost: the text encoders run once, or twice where the pipeline encodes negative prompts only
        beside positive ones.
        Raises: ``UnsupportedModel`` without text encoders, or where texts are encoded together with
        an image.
        """
        import torch

        parameters = inspect.signature(pipe.encode_prompt).parameters
        _check_encoder(pipe, texts, "image" in parameters)
        beside = negative and "negative_prompt" in parameters
        if negative and not beside:  # there every text is encoded as a prompt
            others = {name.removeprefix("negative_"): value for name, value in others.items()}
        arguments: dict[str, Any] = {
            "prompt": list(texts),
            "device": pipe._execution_device,
            "num_images_per_prompt": 1,
            "num_videos_per_prompt": 1,
            "prompt_2": None,
            "prompt_3": None,
            **others,
            **_options_of(pipe, call or {}),
            "do_classifier_free_guidance": beside,
        }
        if beside:
            arguments["negative_prompt"] = list(texts)
        with torch.no_grad():
            values = pipe.encode_prompt(
                **{name: value for name, value in arguments.items() if name in parameters}
            )
        results = dict(zip(self.results, values, strict=True))
        prefix = "negative_" if beside else ""
        return {name: results[prefix + name] for name in self.arguments if prefix + name in results}

    def denoiser(self, embeddings: Mapping[str, Any]) -> dict[str, Any]:
        """``embeddings`` under the denoiser's names."""
        return {
            self.arguments[name]: value
            for name, value in embeddings.items()
            if name in self.arguments and value is not None
        }


def _check_encoder(pipe: Any, texts: Sequence[str], with_image: bool) -> None:
    cls = type(pipe).__name__
    if not has_text_encoder(pipe):
        raise UnsupportedModel(
            f"{cls} has no text encoder loaded, so it cannot encode {list(texts)!r}."
        )
    if with_image:
        raise UnsupportedModel(
            f"{cls} encodes a text together with its image. Encode {list(texts)!r} with "
            "pipe.encode_prompt(image=..., prompt=...) and pass the embeddings and their mask: "
            "NAG(negative_embeds={'negative_prompt_embeds': ..., ...})."
        )


def _options_of(pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """Options of ``encode_prompt`` as a pipeline call would set them."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    options = {
        name: call.get(name, parameters[name].default) for name in ENCODING if name in parameters
    }
    options |= {name: call[name] for name in ENCODING if name in call}
    scales = [call[name]["scale"] for name in LORA_OPTIONS if "scale" in (call.get(name) or {})]
    return options | ({"lora_scale": scales[0]} if scales else {})


def has_text_encoder(pipe: Any) -> bool:
    """Whether any text encoder is loaded."""
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    return any(getattr(pipe, name, None) is not None for name in names)


@dataclass(frozen=True, slots=True)
class TextLayers:
    """The attention layers of a denoiser that see text."""

    # regular expression which the dotted names of their modules match as a whole
    pattern: str
    # "cross" (text keys only) or "joint" (text and image in one softmax)
    kind: Literal["cross", "joint"]
    # whether the text stands before or behind the image in a joint sequence
    text: Literal["first", "last"] = "first"
    # (denoiser, arguments of its call) -> positions of "prompt" and "image" in each row, where they
    # differ between rows
    row_parts: Callable[[Any, Mapping[str, Any]], tuple[Parts, ...]] | None = None


CROSS = TextLayers(r"transformer_blocks\.\d+\.attn2", "cross")

SELF = r"transformer_blocks\.\d+\.attn1"
"""Names of attention layers that see the image alone, in most models with cross-attention."""

# (call of a module, its arguments, tokens of the prompt, tokens of the second text) -> its result
Around = Callable[[Callable[..., Any], tuple[Any, ...], Mapping[str, Any], int, int], Any]


@dataclass(frozen=True, slots=True)
class SecondText:
    """How a second text, such as NAG's negative prompt, reaches the text layers.

    It stands behind the prompt on the sequence axis, or in rows of its own.
    """

    # denoiser -> whether it needs rows of its own: its image positions start where the text ends,
    # or its texts have one length
    in_rows: Callable[[Any], bool] = field(default=lambda denoiser: False)
    # modules that number or count the text tokens: name in the denoiser -> their call for two texts
    around: Mapping[str, Around] = field(default_factory=dict)
    # regular expression of modules, besides those of its attention layers, that treat text tokens
    # one by one; None: there are none
    tokens: str | None = None
    # stack of blocks in which the published layout runs a second image stream; None: no such layout
    image_stack: str | None = None
    # regular expression of modules that, before that stack, have the same image tokens in both rows
    image_modules: str | None = None
    # denoiser argument with the pooled text that modulates that second stream
    pooled: str | None = None
    # pipeline -> why it cannot take a second text, None when it can
    check: Callable[[Any], str | None] = field(default=lambda pipe: None)


def always(denoiser: Any) -> bool:
    """For ``SecondText.in_rows``: every denoiser of the family."""
    return True
