"""Cluster-aware token pruning, CAT (Cheng et al. 2025, arXiv:2502.00433)."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, replace
from typing import Literal

import torch

from diffalign.core import StepInfo, Tensor, TokenTechnique, option
from diffalign.pruning import choices
from diffalign.pruning.movement import Movement
from diffalign.pruning.regions import regions


@dataclass(frozen=True, slots=True)
class CAT(TokenTechnique[Movement]):
    """Computes a share of the image tokens from some step on; the others keep their prediction.

    Cheng et al. 2025, arXiv:2502.00433. Tokens leave right after the patch embedding; attention
    sees the keys and values of all tokens, each as of the step that computed it last. A quarter of
    the S computed tokens are those that moved most since step ``start - 2``, region by region; the
    rest were computed longest ago, so no token waits longer than ceil(N / (S - S // 4)) + 1 steps
    in a run of at most 120; ages are halved at each step, and older ones are alike.
    ``selection`` has the baselines to compare with: each token in
    turn (once in ceil(N / S) steps), random, the largest movement alone, and the metric of RAS.
    Differs from the paper: tokens that are left out skip every layer, which gives the same image
    for the same choice of tokens, and the choice sees their last prediction, not an estimate; S is
    fixed; regions grow from tiles; the first choice does not mix neighbouring regions; regions
    after the first two give no further tokens that are stale.
    Passes that change attention (PAG, SEG), and those without keys and values of the step before,
    compute all tokens.
    Cost: no extra pass; a step that leaves tokens out costs little more than ``keep`` of a full
    one, and keys and values of every layer stay in memory, 2 C (N + L) numbers for each layer and
    row (PixArt: 2 C N). With S of N image tokens, L text tokens and width C its share of a full
    step is
    [24 C^2 (S + L) + 4 C (S + L)(N + L)] / [24 C^2 (N + L) + 4 C (N + L)^2] in joint attention; on
    PixArt, which reads text by cross-attention,
    [28 C^2 S + 4 C^2 L + 4 C S (N + L)] / [28 C^2 N + 4 C^2 L + 4 C N (N + L)]. The report counts
    so too, without the second attention of NAG.
    """

    keep: float = option(
        0.3,
        "share of the image tokens that a step computes, 1 is off",
        low=0.0,
        high=1.0,
        open_low=True,
    )
    _: KW_ONLY
    start: int = option(
        8, "first step that leaves tokens out, counted from 0", low=2, usual=(2, 20)
    )
    selection: Literal["cluster", "round-robin", "random", "movement", "ras"] = option(
        "cluster",
        "which tokens are computed: cluster is the paper's, the others are baselines",
    )
    clusters: int = option(20, "regions of the image, for cluster", low=1, usual=(4, 64))

    @property
    def off(self) -> bool:
        return self.keep == 1.0

    def init(self, batch: int) -> Movement:
        return Movement()

    def active(self, step: StepInfo) -> bool:
        return step.index >= self.start - 2

    def remembers(self, step: StepInfo) -> bool:
        return self.start - 1 <= step.index < step.count - 1

    def choose(self, step: StepInfo, state: Movement) -> Tensor | None:
        labels, latest, drops = state.labels, state.latest, state.drops
        if step.index < self.start or labels is None or latest is None or drops is None:
            return None
        (batch, tokens), device = labels.shape, labels.device
        count = max(1, math.floor(self.keep * tokens + 1e-9))
        if self.selection == "round-robin":
            return choices.in_turn(batch, tokens, count, step.index, device)
        if self.selection == "random":
            return choices.at_random(batch, tokens, count, step.index, device)
        if self.selection == "ras":
            return choices.starving(latest, drops, count)
        delta = latest.float() - _given(state.reference).float()
        if self.selection == "movement":
            return choices.largest(delta.norm(dim=-1), count)
        return self._by_cluster(delta, state, count)

    def _by_cluster(self, delta: Tensor, state: Movement, count: int) -> Tensor:
        """The paper's choice: what moved most, region by region, and what is stalest."""
        labels, device = _given(state.labels), delta.device
        if state.rounds == 0:  # a tenth from each region until there are enough
            quotas = torch.full((self.clusters,), max(1, count // 10), device=device)
            return choices.by_region(delta, labels, quotas, count)
        quota = max(1, count // 20)
        factors = (3 - torch.arange(self.clusters, device=device)).clamp_min(1)
        moving = choices.by_region(delta, labels, quota * factors, count // 4)
        return choices.with_stalest(_given(state.visits), moving, count)

    def observe(
        self,
        prediction: Tensor,
        computed: Tensor | None,
        grid: tuple[int, int, int],
        step: StepInfo,
        state: Movement,
    ) -> Movement:
        if state.reference is None:
            return replace(state, reference=prediction, latest=prediction)
        state = replace(state, latest=prediction)
        zeros = prediction.new_zeros(prediction.shape[:2], dtype=torch.float32)
        if state.labels is None:
            labels = zeros.long()
            if self.selection == "cluster":
                labels = regions(prediction, grid, self.clusters)
            return replace(state, labels=labels, visits=zeros, drops=zeros)
        share = zeros + 1.0 if computed is None else zeros.scatter(1, computed, 1.0)
        visits = _given(state.visits) / 2 + share
        drops = _given(state.drops) + 1.0 - share
        return replace(state, visits=visits, drops=drops, rounds=state.rounds + 1)


def _given(tensor: Tensor | None) -> Tensor:
    """A part of the state that is there once tokens are left out."""
    assert tensor is not None
    return tensor
