"""Guidance weight chosen per image and step by scoring candidates."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Self

import torch

from diffalign.core import (
    CALL,
    CFG_PASSES,
    COND,
    FLOW,
    UNCOND,
    Context,
    Guidance,
    Pass,
    StepInfo,
    Tensor,
    Windowed,
    auto,
    filled,
    option,
)
from diffalign.core.option import completed, derived
from diffalign.core.types import Json
from diffalign.guidance.cfg import passes_at
from diffalign.guidance.evaluators import Evaluator, evaluator_named, latents_for, preferred


@dataclass(frozen=True, slots=True)
class DynamicState:
    """Choices so far, and what the next one builds on."""

    # the weights used, one [B] per step
    weights: tuple[Tensor, ...] = ()
    # index of each image's candidate at the current step, -1 the default weight
    pick: Tensor | None = None
    # mean score of each evaluator over the candidates at the last scored step [E, B], None before
    level: Tensor | None = None

    def select(self, rows: Sequence[int]) -> "DynamicState":
        """The state of those images."""
        images = list(rows)
        return DynamicState(
            tuple(value[images] for value in self.weights),
            None if self.pick is None else self.pick[images],
            None if self.level is None else self.level[:, images],
        )


@dataclass(frozen=True, slots=True)
class DynamicCFG(Windowed, Guidance[DynamicState]):
    """Gives every image, at each step, the candidate weight that its evaluators like best.

    Papalampidi et al. 2025, arXiv:2509.16131. The candidates are mixed from the same two
    predictions; evaluators score the denoised image or the latents of a pure one-step formula,
    never the scheduler, whose history sees only the winner. The window says where weights are
    chosen; judges trained on clean images are unreliable at high noise. A score that is not finite
    has no say.
    Differs from the paper: it leaves scale and sign of the scores open; here they are standardised
    over an image's candidates, an evaluator's level is its mean over them, improvements are floored
    at 0, and all zero means equal weights.
    Cost: 2 passes per step for any number of candidates, plus the evaluators; with one candidate
    nothing is scored.
    Raises: ValueError for several candidates without an evaluator.
    """

    scale: float = auto(
        CALL,
        "the weight outside the window, for ties and where no evaluator prefers anything",
        usual=(1.0, 15.0),
    )
    _: KW_ONLY
    candidates: tuple[float, ...] = auto(
        "dynamic-cfg/candidates", "the weights to choose from", nonempty=True
    )
    evaluators: tuple[Evaluator | str, ...] = option(
        (),
        "names (emoji-alignment reads latents of emoji, reward:NAME is any reward through the "
        "pipeline's decoder) or objects with score(latents, sigma, rows)",
        saved="objects",
    )
    adaptive: bool = option(
        True, "weigh evaluators by relative improvement over the last step, else equally"
    )
    flow: bool = auto(FLOW, "whether noise levels are those of a flow model")
    # the evaluators of this call, in the order of their names
    judges: tuple[Evaluator, ...] = derived(())

    def check(self) -> None:
        self.check_window()
        if self.candidates is not None and len(set(self.candidates)) != len(self.candidates):
            raise ValueError(
                f"DynamicCFG(candidates=...) must differ from each other; got {self.candidates!r}."
            )

    def resolve(self, context: Context) -> Self:
        technique = filled(self, context)
        if len(technique.candidates) > 1 and not technique.evaluators:
            raise ValueError(
                "DynamicCFG has candidates but no evaluator to choose with; pass "
                "evaluators=(...), or use CFG."
            )
        entries = technique.evaluators
        judges = tuple(evaluator_named(e, context) if isinstance(e, str) else e for e in entries)
        # the report holds plain data
        names = tuple(e if isinstance(e, str) else type(e).__name__ for e in entries)
        return completed(dataclasses.replace(technique, evaluators=names), judges=judges)

    def extras(self, state: DynamicState) -> Json:
        """``chosen``: the weight of each step (rows) and image (columns)."""
        return {"chosen": torch.stack(state.weights).tolist() if state.weights else []}

    def init(self, batch: int) -> DynamicState:
        return DynamicState()

    def choices(self, step: StepInfo) -> tuple[float, ...]:
        """The weights between which this step may choose."""
        return self.candidates if self.active(step) else (self.scale,)

    def passes(self, step: StepInfo, state: DynamicState) -> tuple[Pass, ...]:
        choices = self.choices(step)
        return CFG_PASSES if len(choices) > 1 else passes_at(choices[0])

    def combine(
        self, preds: Mapping[Pass, Tensor], step: StepInfo, state: DynamicState
    ) -> tuple[Tensor, DynamicState]:
        if len(preds) == 1:
            ((branch, value),) = preds.items()
            return value, self._noted(state, step, value, float(branch == COND))
        cond, uncond, choices = preds[COND], preds[UNCOND], self.choices(step)
        if len(choices) == 1:
            guided = step.mix(cond, uncond, choices[0])
            return guided, self._noted(state, step, cond, choices[0])
        pick = state.pick
        if step.evaluation == 0 or pick is None:
            pick, state = self._choose(cond, uncond, step, state)
        # one row of each candidate, mixed with a plain number: the bits are those of CFG at the
        # chosen weight
        guided = self._mixed(cond, uncond, self.scale, step)
        for k, weight in enumerate(self.candidates):
            here = (pick == k).reshape(-1, *(1,) * (cond.ndim - 1))
            guided = torch.where(here, self._mixed(cond, uncond, weight, step), guided)
        return guided, state

    def _mixed(self, cond: Tensor, uncond: Tensor, weight: float, step: StepInfo) -> Tensor:
        if weight in (0.0, 1.0):
            return cond if weight else uncond
        return step.mix(cond, uncond, weight)

    def _noted(
        self, state: DynamicState, step: StepInfo, prediction: Tensor, weight: float
    ) -> DynamicState:
        """The state after a step at which nothing was chosen."""
        if step.evaluation != 0:
            return state
        weights = torch.full((len(prediction),), weight, device=prediction.device)
        return dataclasses.replace(state, weights=(*state.weights, weights), pick=None)

    @torch.no_grad()
    def _choose(
        self, cond: Tensor, uncond: Tensor, step: StepInfo, state: DynamicState
    ) -> tuple[Tensor, DynamicState]:
        """Score the candidates; each image's choice and the state with it, all on the device."""
        rows = [row for row in range(len(cond)) for _ in self.candidates]
        scores = []
        for judge in self.judges:
            latents, sigma = latents_for(judge, cond, uncond, self.candidates, step, flow=self.flow)
            scored = judge.score(latents, sigma, rows)
            if scored.shape != (len(rows),):
                raise ValueError(
                    f"{judge!r} must score {len(rows)} latents as a tensor of shape "
                    f"[{len(rows)}]; got {list(scored.shape)}."
                )
            scores.append(scored.float().reshape(len(cond), len(self.candidates)))
        table = torch.stack(scores)  # [E, B, K]
        pick = preferred(table, state.level if self.adaptive else None)
        # -1 is the last: the default
        weights = torch.tensor([*self.candidates, self.scale], device=pick.device)[pick]
        return pick, DynamicState((*state.weights, weights), pick, table.mean(2))
