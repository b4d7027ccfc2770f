"""Pipelines whose denoisers can leave image tokens out."""

from __future__ import annotations

from typing import Any

from diffalign.families.family import Family
from diffalign.seams.denoiser.cache import is_cached


def refusal(family: Family, pipe: Any) -> str | None:
    """Why no token technique can act on a pipeline, None when one can."""
    if family.tokens is None:
        return (
            f"diffalign does not know where the image tokens of {family.name} are embedded and put "
            "out, so it can leave none out"
        )
    if getattr(pipe, "controlnet", None) is not None:
        return "a ControlNet adds to every image token, so none can be left out"
    if any(map(is_cached, family.present(pipe).values())):
        return (
            "a step cache of the denoiser takes the tokens of one step for those of another. "
            "Disable the cache"
        )
    return None
