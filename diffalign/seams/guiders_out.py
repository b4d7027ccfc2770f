"""Our techniques as diffusers' guiders: ours on modular pipelines."""

from __future__ import annotations

from typing import Any


def guider(technique: Any, pipe: Any, *, denoiser: str | None = None) -> Any:
    """``technique`` as a guider for a modular pipeline.

    ``pipe.update_components(guider=da.guider(da.AdaptiveGuidance(), pipe))``. ``technique``: a
    guidance; ``scale=None`` takes the scale of the guider that ``pipe`` has now. ``denoiser``: the
    component it serves when there are two (``guider_2=da.guider(technique, pipe,
    denoiser="transformer_2")``). Modular pipelines run passes one after another, so the saving of a
    skipped pass is a whole call.
    Raises: ``UnsupportedModel`` for a pipeline of another family, TypeError for a technique that is
    not a guidance.
    """
    from diffalign.seams.technique_guider import TechniqueGuider

    return TechniqueGuider(technique=technique).bind(pipe, denoiser)
