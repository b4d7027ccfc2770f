"""What guidances by perturbed attention share: a third pass that is the conditional model with the
self-attention of chosen layers changed."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Self

from diffalign.core import AttentionTechnique, Context, Pass, Site, StepInfo, filled, option
from diffalign.core.errors import UnsupportedModel
from diffalign.core.option import completed, derived
from diffalign.core.registry import name_of
from diffalign.families import family_named
from diffalign.guidance.pushed import PushedAway
from diffalign.seams.attention.sites import select_maps

PERTURBED = Pass("cond-perturbed", True)


@dataclass(frozen=True, slots=True)
class MapChange(AttentionTechnique):
    """Changes how image tokens attend to one another at the layers ``names``."""

    names: frozenset[str]

    def selects(self, site: Site) -> bool:
        return site.layer in self.names


@dataclass(frozen=True, slots=True)
class PerturbedAttention(PushedAway):
    """Pushes away from the conditional model with the attention of some layers changed.

    Subclasses say how strong ``push`` is and what ``change`` is made.
    """

    _: KW_ONLY
    layers: tuple[str, ...] | None = option(
        None,
        "patterns of layer names with *; none is the middle of a U-Net and the middle block of a "
        "transformer",
        nonempty=True,
    )
    # the change at the layers of this model
    perturbation: MapChange | None = derived(None)

    acts_alone: ClassVar[bool] = True

    def change(self, names: frozenset[str]) -> MapChange:
        """What happens to the attention of those layers."""
        raise NotImplementedError

    @property
    def extra_passes(self) -> tuple[Pass, ...]:
        return () if self.push == 0.0 else (self._pass(),)

    def worse(self, step: StepInfo) -> Pass:
        return self._pass()

    def _pass(self) -> Pass:
        return Pass(PERTURBED.name, True, attention=self.perturbation)

    def resolve(self, context: Context) -> Self:
        self.check_steps(context)
        owner, names = type(self).__name__, self.layers or ()
        reason = context.refusal(name_of(self), self)
        if reason is not None:
            raise UnsupportedModel(f"{owner} cannot act on {context.pipeline}: {reason}")
        if context.module is not None:
            family = family_named(context.family)
            names = select_maps(owner, family, context.module, self.layers)
        return completed(filled(self, context), perturbation=self.change(frozenset(names)))
