"""How the branches agree along plain CFG, and what every threshold of AdaptiveGuidance would cost
on the same trajectories.

Up to the step that latches, AdaptiveGuidance is plain CFG (Castillo et al. 2023, arXiv:2312.12487).
So its curves tell for every threshold at which step each image would latch; no second generation is
needed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch

from diffalign.core import (
    CALL,
    CFG_PASSES,
    Context,
    Pass,
    StepInfo,
    Tensor,
    TwoBranches,
    UnsupportedModel,
    auto,
    filled,
    option,
)
from diffalign.core.types import Pipeline
from diffalign.generate.samples import samples
from diffalign.generate.seeds import jobs_of
from diffalign.guidance.adaptive_guidance import agreement


@dataclass(frozen=True, slots=True)
class Recording(TwoBranches[None]):
    """Guides by plain CFG and hands each step's ``agreement`` to ``sink``."""

    scale: float = auto(CALL, "guidance scale")
    space: Literal["eps", "x0"] = option("eps", "what is compared")
    sink: Callable[[int, Tensor | None], None] = option(
        None, "called with the step and a cosine per image, None at a solver's second evaluation"
    )

    def resolve(self, context: Context) -> Self:
        technique = filled(self, context)
        if technique.scale == 1.0:
            raise UnsupportedModel(
                f"There is nothing to save: {context.pipeline} runs without guidance here. Give a "
                "scale above 1."
            )
        return technique

    def passes(self, step: StepInfo, state: None) -> tuple[Pass, ...]:
        return CFG_PASSES

    def guide(
        self, cond: Tensor, uncond: Tensor, step: StepInfo, state: None
    ) -> tuple[Tensor, None]:
        first = step.evaluation == 0
        self.sink(step.index, agreement(cond, uncond, step, self.space) if first else None)
        return step.mix(cond, uncond, self.scale), None


@dataclass(frozen=True, slots=True)
class Curves:
    """Plain CFG's trajectories as AdaptiveGuidance sees them."""

    # of each image at each step, [N, S] float64
    cosine: Tensor
    # of the model, by each step; they sum to E
    evaluations: tuple[int, ...]
    # ``min_guided_steps`` of the AdaptiveGuidance to come
    minimum: int = 2

    @property
    def _highest(self) -> Tensor:
        """[N, S - minimum + 1]: the highest cosine so far among the steps that may latch; a
        threshold latches where it is first reached."""
        return self.cosine[:, self.minimum - 1 :].cummax(1).values

    def latches(self, threshold: float) -> Tensor:
        """[N] integers: the last guided step of each image, S where it never latches."""
        return (self._highest < threshold).sum(1) + self.minimum - 1

    def nfe(self, threshold: float) -> Tensor:
        """[N] evaluations of each image: every step conditionally, the guided ones a second time.
        Plain CFG costs 2 E."""
        guided = torch.tensor([0, *self.evaluations, 0]).cumsum(0)[1:]
        return guided[self.latches(threshold)] + sum(self.evaluations)

    def saving(self, threshold: float) -> float:
        """The share of plain CFG's evaluations that is saved, mean over images, in [0, 0.5)."""
        return 1.0 - float(self.nfe(threshold).double().mean()) / (2 * sum(self.evaluations))

    def threshold_for(self, saving: float) -> float:
        """The highest threshold that saves at least ``saving`` on average, as the shortest number
        that does so with the same latches.

        Raises ValueError when even the lowest threshold saves less.
        """
        # the saving changes at these only, and never rises
        values: list[float] = sorted(set(self._highest.flatten().tolist()))
        k = bisect_left(values, True, key=lambda value: self.saving(value) < saving - 1e-12) - 1
        if k < 0:
            raise ValueError(
                f"saving must be at most {self.saving(-1.0):.3f} for {len(self.evaluations)} "
                f"steps, {self.minimum} of which are always "
                f"guided; got {saving:g}."
            )
        below = values[k - 1] if k else values[0] - 0.01
        # far from the next image's cosine, whose last bits may differ from run to run
        middle = (below + values[k]) / 2
        return next(
            (t for digits in range(2, 16) if below < (t := round(middle, digits)) <= values[k]),
            values[k],
        )


def record(
    pipe: Pipeline,
    prompts: Sequence[str],
    *,
    scale: float,
    space: Literal["eps", "x0"] = "eps",
    minimum: int = 2,
    batch: int = 16,
    seed: int = 0,
    step: Callable[[], None] | None = None,
    **call: object,
) -> tuple[Curves, Tensor]:
    """Plain CFG on every prompt: the curves, and the images in 8 bits, uint8 [N, 3, H, W].

    ``call``: arguments of the pipeline; the others are those of ``samples``. Cost: as plain CFG;
    one device synchronisation per batch.
    """
    cosines: dict[int, list[Tensor]] = {}
    evaluations: dict[int, int] = {}
    parts: list[Tensor] = []
    images: list[Tensor] = []

    def sink(index: int, cosine: Tensor | None) -> None:
        evaluations[index] = evaluations.get(index, 0) + 1
        if cosine is not None:
            cosines.setdefault(index, []).append(cosine)

    techniques = (Recording(scale, space, sink),)
    for results in samples(
        pipe, techniques, jobs_of(prompts, base=seed), batch=batch, call=call, step=step
    ):
        images += [eight_bits(sample.image) for sample in results]
        parts.append(torch.stack([cosines[i][0] for i in sorted(cosines)], dim=1).cpu().double())
        counts = tuple(evaluations[i] for i in sorted(evaluations))
        cosines.clear()
        evaluations.clear()
    return Curves(torch.cat(parts), counts, minimum), torch.stack(images)


def eight_bits(image: Tensor) -> Tensor:
    """Values in [0, 1] as they are saved: uint8."""
    return (image * 255.0).round().to(torch.uint8)
