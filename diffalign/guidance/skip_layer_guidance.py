"""Skip-layer guidance: away from the same model without a few fixed blocks (Stability AI 2024, with
SD3.5 medium)."""

import dataclasses
from dataclasses import KW_ONLY, dataclass
from typing import Self

from diffalign.core import Context, UnsupportedModel, option
from diffalign.guidance.skipping import SkippedBlocks
from diffalign.seams.blocks.sites import select


@dataclass(frozen=True, slots=True)
class SkipLayerGuidance(SkippedBlocks):
    """Adds ``slg_scale * (cond - skipped)`` to CFG, ``skipped`` without the blocks ``layers``.

    The rule that Stability AI released with SD3.5 medium and diffusers' SD3 pipeline implements;
    compare spatiotemporal skip guidance (Hyung et al. 2024, arXiv:2411.18664).
    Differs from diffusers: its SD3 pipeline acts for ``start * S < index < stop * S``, so never at
    step 0; here ``start`` 0 means step 0.
    Cost: 3 passes per step inside the window, 2 outside; 2 and 1 at ``scale`` 1.
    Raises: ``UnsupportedModel`` on models whose blocks are not known, and without ``layers`` on
    models other than SD3.5 medium, since no other has published ones.
    """

    _: KW_ONLY
    layers: tuple[int | str, ...] | None = option(
        None,
        "positions of blocks from 0 in the order in which they run (both stacks of Flux count as "
        "one), names, or patterns with *; none is (7, 8, 9) on SD3.5 medium",
        nonempty=True,
    )
    slg_scale: float = option(
        2.8,
        "weight of the skipped pass; 0 is off, 2.8 is what diffusers takes for SD3.5 medium",
        usual=(0.0, 5.0),
    )
    start: float = option(
        0.01, "first step that acts, as a fraction of the steps", low=0.0, high=1.0
    )
    stop: float = option(
        0.2, "first step that no longer acts, as a fraction of the steps", low=0.0, high=1.0
    )

    @property
    def push(self) -> float:
        return self.slg_scale

    def blocks_at(self, index: int) -> tuple[str, ...]:
        return self.names

    def resolve(self, context: Context) -> Self:
        technique = self
        if self.layers is None:
            technique = dataclasses.replace(self, layers=_published_layers(context))
        return technique.with_names(context, "layers", technique.layers)


def _published_layers(context: Context) -> tuple[int | str, ...]:
    """The layers that were published for this model."""
    if context.module is not None:
        # where no block can be skipped, no layers would help
        select("SkipLayerGuidance", "layers", context.module, ("*",))
    config = getattr(context.module, "config", {})
    facts = {
        "num_layers": config.get("num_layers"),
        "dual_attention": bool(config.get("dual_attention_layers")),
    }
    try:
        return tuple(context.look_up("layers", "skip-layer-guidance/layers", **facts))
    except LookupError:
        raise UnsupportedModel(
            "SkipLayerGuidance needs layers=... for this model: only SD3.5 medium has "
            "published ones. "
            "Try one block from the first third, or S2Guidance, which draws its blocks."
        ) from None
