"""Skip-layer guidance: away from the same model without a few fixed blocks (Stability AI 2024, with
SD3.5 medium)."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Self

from diffalign.core import Context, UnsupportedModel
from diffalign.guidance.skipping import SkippedBlocks
from diffalign.seams.blocks.sites import select


@dataclass(frozen=True, slots=True)
class SkipLayerGuidance(SkippedBlocks):
    """CFG plus ``slg_scale * (cond - skipped)``, where ``skipped`` is the conditional model without
    the blocks ``layers``.

    The rule that Stability AI released with SD3.5 medium and diffusers' SD3 pipeline implements;
    compare spatiotemporal skip guidance (Hyung et al. 2024, arXiv:2411.18664). ``scale``: 1 is off
    for the CFG part, None the pipeline's own value. ``slg_scale``: 0 is off; 2.8, with ``start``
    0.01 and ``stop`` 0.2, is what diffusers takes for SD3.5 medium. ``layers``: positions of blocks
    from 0 in the order in which they run (both stacks of Flux count as one), names, or patterns
    with ``*``; None is (7, 8, 9) on SD3.5 medium and an error elsewhere, since no other model has
    published layers. Differs from diffusers: its SD3 pipeline acts for ``start * S < index < stop *
    S``, so never at step 0; here ``start`` 0 means step 0.
    Cost: 3 passes per step inside the window, 2 outside; 2 and 1 at ``scale`` 1.
    """

    push_name: ClassVar[str] = "slg_scale"
    layers: tuple[int | str, ...] | None = dataclasses.field(default=None, kw_only=True)
    slg_scale: float = dataclasses.field(default=2.8, kw_only=True)
    start: float = dataclasses.field(default=0.01, kw_only=True)
    stop: float = dataclasses.field(default=0.2, kw_only=True)

    def __post_init__(self) -> None:
        if self.layers is not None and not self.layers:
            raise ValueError("SkipLayerGuidance(layers=...) must name at least one block; got ().")
        SkippedBlocks.__post_init__(self)

    def chosen(self, index: int) -> tuple[str, ...]:
        return self.names

    def resolve(self, context: Context) -> tuple[Self, dict[str, str]]:
        layers, source = self.layers, ""
        if layers is None:
            if context.module is not None:
                select(
                    "SkipLayerGuidance", "layers", context.module, ("*",)
                )  # where no block can be skipped, no layers would help
            config = getattr(context.module, "config", {})
            try:
                layers = context.look_up(
                    "layers",
                    "skip-layer-guidance/layers",
                    num_layers=config.get("num_layers"),
                    dual_attention=bool(config.get("dual_attention_layers")),
                )
                source = context.sources["layers"]
            except LookupError:
                raise UnsupportedModel(
                    "SkipLayerGuidance needs layers=... for this model: only SD3.5 medium has "
                    "published ones. "
                    "Try one block from the first third, or S2Guidance, which draws its blocks."
                ) from None
        made, sources = dataclasses.replace(self, layers=layers).with_names(
            context, "layers", layers
        )
        return made, {**sources, "layers": source}
