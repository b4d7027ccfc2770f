"""Images and text as inputs of a vision-language model, with a gradient where the model's way of
cutting images is known."""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.rewards.checkpoint import DAMAGED, Foreign, Source
from diffalign.rewards.preprocessing import normalised, resized
from diffalign.rewards.toys import bytes_of

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Model types whose images are cut as ``patches`` does."""


def processor_of(source: Source, owner: str, revision: str | None) -> Foreign:
    """The processor of a vision-language model. Raises: ValueError where there is none."""
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(source, revision=revision)
    except DAMAGED as error:
        raise ValueError(
            f"{owner}: no processor could be loaded from {str(source)!r}: {error}"
        ) from error


def patches(image: Tensor, processor: Foreign, grid: tuple[int, int]) -> Tensor:
    """An image [3, H, W] in [0, 1] as rows of pixels [gh gw, 3 t p p], as Qwen-VL's processor cuts
    it into ``grid`` (gh, gw) squares of p pixels, each repeated for t frames, those of one merged
    token next to each other."""
    side, merge, frames = (
        int(getattr(processor, name))
        for name in ("patch_size", "merge_size", "temporal_patch_size")
    )
    rows, columns = grid
    large = resized(image[None], rows * side, columns * side)
    pixels = normalised(large, processor.image_mean, processor.image_std)
    cut = pixels.view(3, rows // merge, merge, side, columns // merge, merge, side)
    ordered = cut.permute(1, 4, 2, 5, 0, 3, 6).reshape(rows * columns, 3, 1, side, side)
    return ordered.expand(-1, -1, frames, -1, -1).reshape(rows * columns, -1)


def inputs_of(
    processor: Foreign, image: Tensor, text: str, differentiable: bool
) -> dict[str, Tensor]:
    """Inputs of the model for one image [3, H, W] and one turn of a user, on the image's device."""
    from PIL import Image

    content = [{"type": "image"}, {"type": "text", "text": text}]
    chat = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    picture = Image.fromarray(bytes_of(image[None])[0].numpy())
    encoded = processor(text=[chat], images=[picture], return_tensors="pt")
    inputs: dict[str, Tensor] = {key: value.to(image.device) for key, value in encoded.items()}
    if differentiable:
        _, rows, columns = encoded["image_grid_thw"][0].tolist()
        inputs["pixel_values"] = patches(image, processor.image_processor, (rows, columns))
    return inputs


def as_dtype(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs with their pixels in the model's dtype."""
    return inputs | {"pixel_values": inputs["pixel_values"].to(dtype)}
