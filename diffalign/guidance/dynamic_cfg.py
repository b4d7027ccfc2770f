"""Guidance weight chosen per image and step by scoring candidates (Papalampidi et al.

2025, arXiv:2509.16131).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Self

import torch

from diffalign.core import COND, UNCOND, Context, Pass, StepInfo, Tensor, Windowed
from diffalign.core.checks import check_scale
from diffalign.core.presets import preset
from diffalign.guidance.base import Guidance
from diffalign.guidance.cfg import CFG
from diffalign.guidance.evaluators import Evaluator, evaluator_named, latents_for, preferred


@dataclass(frozen=True, slots=True)
class DynamicState:
    """``chosen``: the weights used, one ``[B]`` per step so far. ``pick``: index of the current
    step's candidates, -1 the default weight.

    ``level``: mean score of each evaluator over the candidates at the last scored step, ``[E, B]``;
    None before.
    """

    chosen: tuple[Tensor, ...] = ()
    pick: Tensor | None = None
    level: Tensor | None = None

    def select(self, rows: Sequence[int]) -> "DynamicState":
        """The state of those images."""
        kept = list(rows)
        return DynamicState(
            tuple(value[kept] for value in self.chosen),
            None if self.pick is None else self.pick[kept],
            None if self.level is None else self.level[:, kept],
        )


@dataclass(frozen=True, slots=True)
class DynamicCFG(Windowed, Guidance[DynamicState]):
    """At each step every image takes the candidate weight that its evaluators like best
    (Papalampidi et al. 2025, arXiv:2509.16131).

    The candidates are mixed from the same two predictions; evaluators score the denoised image or
    the latents of a pure one-step formula, never the scheduler, whose history sees only the winner.
    ``scale``: the default weight, None the pipeline's own value; it is used outside the window, for
    ties and where no evaluator prefers anything. ``candidates``: None is looked up for the model
    (``presets.json``), else the paper's set for its latent model. ``evaluators``: names
    ("emoji-alignment" reads latents of `emoji`, "reward:NAME" is any reward through the pipeline's
    decoder, others from ``evaluators.py``), or objects with ``score(latents, sigma, rows)``.
    ``adaptive``: weigh them by relative improvement over the last step, else equally. ``flow``:
    None as the scheduler says. ``sigma`` or ``start``, ``stop``: where weights are chosen; judges
    trained on clean images are unreliable at high noise. Differs from the paper, which leaves scale
    and sign open: scores are standardised over an image's candidates, an evaluator's level is its
    mean over them, improvements are floored at 0, and all zero means equal weights. A score that is
    not finite has no say.
    Cost: 2 passes per step for any number of candidates, plus the evaluators; with one candidate
    nothing is scored.
    """

    scale: float | None = None
    _: KW_ONLY
    candidates: tuple[float, ...] | None = None
    evaluators: tuple[Evaluator | str, ...] = dataclasses.field(
        default=(), metadata={"objects": True}
    )
    adaptive: bool = True
    flow: bool | None = None
    judges: tuple[Evaluator, ...] = dataclasses.field(
        default=(), init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        check_scale("DynamicCFG", self.scale)
        self.check_window()
        if self.candidates is not None:
            if not self.candidates or any(
                not isinstance(w, int | float) or not math.isfinite(w) for w in self.candidates
            ):
                raise ValueError(
                    "DynamicCFG(candidates=...) must be one or more finite weights; got "
                    f"{self.candidates!r}."
                )
            if len(set(self.candidates)) != len(self.candidates):
                raise ValueError(
                    "DynamicCFG(candidates=...) must differ from each other; got "
                    f"{self.candidates!r}."
                )
        for evaluator in self.evaluators:
            if not isinstance(evaluator, str | Evaluator):
                raise TypeError(
                    "DynamicCFG(evaluators=...) takes names or objects with score(latents, "
                    f"sigma, rows); got {evaluator!r}."
                )

    @property
    def weights(self) -> tuple[float, ...]:
        """The candidates, once they are known."""
        assert self.candidates is not None, "resolve() looks the candidates up"
        return self.candidates

    def resolve(self, context: Context) -> tuple[Self, dict[str, str]]:
        made, sources = Guidance.resolve(self, context)
        if made.candidates is None:
            value, sources["candidates"] = preset(
                "dynamic-cfg", "candidates", context.facts() | {"scale": made.scale}
            )
            made = dataclasses.replace(made, candidates=tuple(float(w) for w in value))
        if len(made.weights) > 1 and not made.evaluators:
            raise ValueError(
                "DynamicCFG has candidates but no evaluator to choose with; pass "
                "evaluators=(...), or use CFG."
            )
        judges = tuple(
            evaluator_named(e, context) if isinstance(e, str) else e for e in made.evaluators
        )
        if made.flow is None:
            sources["flow"] = f"parametrisation of {context.scheduler}"
        names = tuple(
            e if isinstance(e, str) else type(e).__name__ for e in made.evaluators
        )  # the report holds plain data
        made = dataclasses.replace(
            made, evaluators=names, flow=context.flow if made.flow is None else made.flow
        )
        object.__setattr__(made, "judges", judges)
        return made, sources

    def extras(self, state: DynamicState) -> dict[str, Any]:
        """``chosen``: the weight of each step (rows) and image (columns)."""
        return {"chosen": torch.stack(state.chosen).tolist() if state.chosen else []}

    def init(self, batch: int) -> DynamicState:
        return DynamicState()

    def passes(self, step: StepInfo, state: DynamicState) -> tuple[Pass, ...]:
        if not self.active(step):
            return CFG(self.scale).passes(step, None)
        return CFG(self.weights[0]).passes(step, None) if len(self.weights) == 1 else (COND, UNCOND)

    def combine(
        self, preds: Mapping[Pass, Tensor], step: StepInfo, state: DynamicState
    ) -> tuple[Tensor, DynamicState]:
        cond, uncond = preds.get(COND), preds.get(UNCOND)
        any_row = next(iter(preds.values()))
        assert self.scale is not None
        if cond is None or uncond is None or not self.active(step) or len(self.weights) == 1:
            weight = self.weights[0] if self.active(step) else self.scale
            if cond is not None and uncond is not None:
                return step.mix(cond, uncond, weight), self._noted(state, step, any_row, weight)
            return any_row, self._noted(state, step, any_row, 1.0 if uncond is None else 0.0)
        if step.evaluation == 0 or state.pick is None:
            state = self._choose(cond, uncond, step, state)
        assert state.pick is not None
        # one row of each candidate, mixed with a plain number: the bits are those of CFG at the
        # chosen weight
        guided = self._mixed(cond, uncond, self.scale, step)
        for k, weight in enumerate(self.weights):
            chosen = (state.pick == k).reshape(-1, *(1,) * (cond.ndim - 1))
            guided = torch.where(chosen, self._mixed(cond, uncond, weight, step), guided)
        return guided, state

    def _mixed(self, cond: Tensor, uncond: Tensor, weight: float, step: StepInfo) -> Tensor:
        if weight in (0.0, 1.0):
            return cond if weight else uncond
        return step.mix(cond, uncond, weight)

    def _noted(
        self, state: DynamicState, step: StepInfo, like: Tensor, weight: float
    ) -> DynamicState:
        if step.evaluation != 0:
            return state
        return dataclasses.replace(
            state,
            chosen=(*state.chosen, torch.full((len(like),), weight, device=like.device)),
            pick=None,
        )

    @torch.no_grad()
    def _choose(
        self, cond: Tensor, uncond: Tensor, step: StepInfo, state: DynamicState
    ) -> DynamicState:
        """Score the candidates and record each image's choice, all on the device."""
        assert self.scale is not None
        assert self.judges, "resolve() looks the evaluators up"
        scores = []
        for evaluator in self.judges:
            latents, sigma = latents_for(
                evaluator, cond, uncond, self.weights, step, flow=bool(self.flow)
            )
            rows = [row for row in range(len(cond)) for _ in self.weights]
            scored = evaluator.score(latents, sigma, rows)
            if scored.shape != (len(rows),):
                raise ValueError(
                    f"{evaluator!r} must score {len(rows)} latents as a tensor of shape "
                    f"[{len(rows)}]; got {list(scored.shape)}."
                )
            scores.append(scored.float().reshape(len(cond), len(self.weights)))
        table = torch.stack(scores)  # [E, B, K]
        pick = preferred(table, state.level if self.adaptive else None)
        weights = torch.tensor([*self.weights, self.scale], device=pick.device)[
            pick
        ]  # -1 is the last: the default
        return DynamicState((*state.chosen, weights), pick, table.mean(2))
