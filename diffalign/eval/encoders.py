"""Features of images by a named encoder, for the Fréchet distance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffalign.core.types import Json
from diffalign.eval.files import RunError, read_json
from diffalign.eval.folder import RunFolder
from diffalign.eval.frechet import Features
from diffalign.eval.scoring import image_root, read_image

if TYPE_CHECKING:
    from torch import Tensor

Encoder = Callable[["Tensor"], "Tensor"]
"""An image [3, H, W] in [0, 1] -> its features [D]."""


def encoder(name: str, device: str = "cpu") -> tuple[Encoder, Json]:
    """The encoder of that name and what defines it: ``emoji-clip``, or the folder or hub id of a
    CLIP whose image side is read.

    Raises: ValueError where it cannot be loaded.
    """
    from diffalign.core.identity import model_hash

    if name == "emoji-clip":
        from diffalign.embedded.load import load

        clip = load(name)
        facts = {"name": name, "revision": model_hash(clip.model)}
        return lambda image: clip.image(image[None])[0], facts
    from transformers import CLIPVisionModelWithProjection

    from diffalign.eval.scorers.blip import MEAN, STD
    from diffalign.eval.scorers.pretrained import facts_of, normalised, pretrained, resized

    model = pretrained(CLIPVisionModelWithProjection, name, device)
    side = int(model.config.image_size)

    def features(image: Tensor) -> Tensor:
        pixels = normalised(resized(image.to(device), (side, side), "bicubic"), MEAN, STD)
        result: Tensor = model(pixel_values=pixels[None]).image_embeds[0]
        return result

    return features, facts_of(name, model) | {"side": side}


def images_in(folder: Path) -> list[Path]:
    """The images of a run, or every PNG, JPEG and WebP below a folder, in the order of their names.

    Raises: ``RunError`` for fewer than two.
    """
    paths: Sequence[Path]
    if read_json(folder / "run.json") is not None:
        run = RunFolder.open(folder)
        root = image_root(run)
        paths = [root / s["file"] for _, record in run.entries() for s in record["samples"]]
    else:
        kinds = (".png", ".jpg", ".jpeg", ".webp")
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in kinds)
    if len(paths) < 2:
        raise RunError(f"{folder} holds {len(paths)} images; a distance of sets needs more.")
    return list(paths)


def features_of(paths: Sequence[Path], encode: Encoder) -> Features:
    """Features [N, D] of images, one by one, so that they do not depend on a batch."""
    return np.stack(list(_rows(paths, encode)))


def _rows(paths: Sequence[Path], encode: Encoder) -> Iterator[Features]:
    import torch

    for path in paths:
        with torch.no_grad():
            yield encode(read_image(path)).double().cpu().numpy()
