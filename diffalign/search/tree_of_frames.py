"""Tree-of-Frames: a video grows chunk by chunk in several branches, and weak ones are dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch

from diffalign.core.option import option
from diffalign.core.search import ByChunks, Candidate, Info, Method, Problem, Stage, Tree
from diffalign.rewards.base import BaseReward
from diffalign.rewards.weighted import parts_of
from diffalign.search.branching import has_room, most, ranked, summary
from diffalign.search.video.choosing import Chooser, Mix, finish, prune
from diffalign.search.video.front import Front, Round, children, roots, twigs_of, valued
from diffalign.search.video.sampler import ChunkSampler
from diffalign.search.video.stages import Splitter, splitter_of, stage_at, stage_prompts


@dataclass(frozen=True)
class TreeOfFrames(Method[Front]):
    """Grow a video chunk by chunk in several branches, score each beginning, keep the best ones.

    At each level, a chunk of the video, a kept beginning gets ``branch`` continuations: its own and
    others from fresh noise. If there are more than ``keep``, they are decoded and scored against
    the text of their stage, which ``splitter`` makes of the prompt: what is there at first, what
    happens, how it ends. The whole videos that remain are scored against the prompt. Several
    rewards (``rewards.Weighted``) are mixed by their weighted ranks, among whole videos too, so
    none outweighs the others by its scale; ``mix="scores"`` adds the scores. ``early``: evaluations
    of the first chunk after which the worse half is dropped by what the model predicts there.
    Numbers for a level that is not named are the last ones. ``keep=0`` with ``branch=(N, 1)`` is
    ``LinearSearch``, which adds the scores of several rewards.

    Paper: Liu et al. 2025, arXiv:2503.18942 (Video-T1, Tree-of-Frames).
    Differs from the paper: its published code never uses the text of the last stage, lets siblings
    share their noise, and tells branches beyond the tenth apart no more.
    Cost: the beginnings at each level times their chunk; each scored one is decoded as far as it
    is. With the chunks of a video alike that is sum_k branch_k keep_(k-1) chunks, against N count
    of linear search.
    Refuses: pipelines that do not go on from a chunk; ``early`` where they do not show predictions.
    """

    branch: tuple[int, ...] = option(
        (6, 2, 1), "continuations of each beginning by level, the last number goes on", low=1
    )
    keep: tuple[int, ...] = option(
        (2,), "beginnings that each level keeps, the last number goes on, 0 for all", low=0
    )
    early: tuple[int, ...] = option(
        (), "evaluations of the first chunk after which the worse half is dropped", low=1
    )
    mix: Mix = option("ranks", "how several rewards choose: by weighted ranks or weighted scores")
    splitter: str | Splitter = option(
        "rules",
        "texts of the stages: rules, whole, the folder of a local language model, or a function",
        saved="objects",
    )
    trees: int | None = option(
        1, "trees from fresh noise, none for as many as the budget allows", low=1
    )

    def check(self) -> None:
        if not self.branch or not self.keep:
            raise ValueError(
                "TreeOfFrames(branch=..., keep=...) need at least one number each; got "
                f"{self.branch} and {self.keep}."
            )
        if list(self.early) != sorted(set(self.early)):
            raise ValueError(f"TreeOfFrames(early=...) must ascend; got {self.early}.")

    @property
    def chunks(self) -> ByChunks:
        return "needs"

    @property
    def ends(self) -> bool:
        return self.trees is not None

    @cached_property
    def split(self) -> Splitter:
        """The splitter as a function."""
        return splitter_of(self.splitter)

    def width(self, level: int, count: int) -> int:
        """Beginnings that stay of ``count`` at a level."""
        return min(self.keep[min(level, len(self.keep) - 1)] or count, count)

    def sizes(self, count: int) -> list[int]:
        """Beginnings that are made at each of ``count`` levels."""
        sizes, beams = [], 1
        for level in range(count):
            sizes.append(beams * self.branch[min(level, len(self.branch) - 1)])
            beams = self.width(level, sizes[-1])
        return sizes

    def refuses(self, problem: Problem) -> str | None:
        sampler = problem.sampler
        if not isinstance(sampler, ChunkSampler):
            return (
                "this pipeline makes a video, or an image, in one piece. Use LinearSearch, or a "
                "pipeline that goes on from a chunk, such as AnyFlowFARPipeline."
            )
        if self.early and not set(self.early) <= set(sampler.looks):
            known = f"{sampler.looks[0]} to {sampler.looks[-1]}" if sampler.looks else "none"
            return f"early={self.early} must be evaluations of the first chunk ({known} here)."
        try:
            texts = stage_prompts(self.split, problem.prompt)
        except ValueError as error:
            return str(error)
        sizes = self.sizes(sampler.count)
        levels = [k for k, size in enumerate(sizes) if size > self.width(k, size)]
        return _too_short(problem, sampler, levels) or _unreadable(problem, sampler, texts, levels)

    def init(self, problem: Problem) -> Front:
        return Front(stage_prompts(self.split, problem.prompt))

    def step(self, problem: Problem, state: Front) -> tuple[Front, Info]:
        count, level = problem.sampler.count, 0 if state.states is None else state.states.step
        chooser = Chooser(problem, state.texts, self.mix)
        size = self._size(problem, state, level)
        if state.states is None:
            round_ = roots(problem, state, size or problem.room(1))
        elif size < len(state.places):
            return finish(chooser, state, Round(state.states, state.lineages, state.places))
        else:
            round_ = children(problem, state, size // len(state.places))
        keep, twigs = self.width(level, len(round_.lineages)), list(state.twigs)
        if level == 0 and self.early:
            round_, rest = prune(chooser, round_, self.early, keep)
            twigs += rest
        round_ = replace(round_, states=problem.run(round_.states, level + 1))
        fresh, rows = twigs_of(round_), list(range(len(round_.lineages)))
        info = Info(f"chunk {level + 1} of {count}: {len(rows)} videos")
        if keep < len(rows):
            marks = chooser.marks(round_.states, stage_at(level, count))
            fresh, rows = (
                valued(fresh, marks.sums.tolist(), marks.frames),
                ranked(chooser.keys(marks), keep),
            )
            info = summary(f"{info.text}, {keep} stay", marks.sums.tolist())
        places = range(len(twigs), len(twigs) + len(fresh))
        front = replace(state, twigs=(*twigs, *fresh))
        survivors = replace(round_, places=tuple(places)).select(rows)
        if level + 1 == count:
            return finish(chooser, front, survivors)
        stay = tuple(places[row] for row in rows)
        return replace(
            front, states=survivors.states, lineages=survivors.lineages, places=stay
        ), info

    def _size(self, problem: Problem, state: Front, level: int) -> int:
        """Videos of this level: all that are wanted, or as many as the budget lets end."""
        beams = 1 if state.states is None else len(state.places)
        number = beams * self.branch[min(level, len(self.branch) - 1)]
        return most(number, partial(_fits, self, problem, level))

    def finished(self, state: Front) -> bool:
        return self.trees is not None and state.trees >= self.trees

    def best(self, problem: Problem, state: Front) -> Candidate | None:
        return state.winner or problem.best

    def tree(self, state: Front) -> Tree | None:
        return state.drawing()


def _too_short(problem: Problem, sampler: ChunkSampler, levels: Sequence[int]) -> str | None:
    """Why there is no choice at one of these levels, None where there is one at each."""
    parts = parts_of(problem.reward, problem.prompt)
    least = min(getattr(part, "least", 1) for _, part in parts)
    for level in levels:
        frames = sampler.frames(level + 1)
        if frames < least:
            return (
                f"a choice after chunk {level + 1} sees {frames} frames, and the reward needs "
                f"{least}. Add one of single frames, such as frames, or keep all at that level "
                "(keep=0)."
            )
    return None


def _unreadable(
    problem: Problem, sampler: ChunkSampler, texts: Mapping[Stage, str], levels: Sequence[int]
) -> str | None:
    """Why a reward cannot score a stage, found out on a grey video; None where it can."""
    choices = dict.fromkeys((stage_at(k, sampler.count), sampler.frames(k + 1)) for k in levels)
    for stage, frames in choices:
        video = torch.full((1, frames, 3, 64, 64), 0.5)
        for _, part in parts_of(problem.reward, problem.prompt):
            reward = part.at(stage) if isinstance(part, BaseReward) else part
            try:
                if frames >= getattr(part, "least", 1):
                    reward(video, [texts[stage]])
            except (ValueError, TypeError, IndexError, RuntimeError) as error:
                return (
                    f"the reward cannot score {frames} frames against the text of the {stage} "
                    f"stage, {texts[stage]!r}: {error} Give another splitter, or keep all at that "
                    "level (keep=0)."
                )
    return None


def _fits(method: TreeOfFrames, problem: Problem, level: int, size: int) -> bool:
    """Whether the budget lets so many videos of a level be made and chosen from, and those that
    stay end."""
    sampler, keep = problem.sampler, method.width(level, size)
    assert isinstance(sampler, ChunkSampler)
    rows = scores = first = 0
    for evaluation in method.early if level == 0 else ():
        if size <= keep:
            break
        rows += size * sampler.look_price(first, evaluation)
        scores += size
        # a preview may be one evaluation ahead of where the chunk goes on
        size, first = max(-(-size // 2), keep), evaluation - 1
    price = max(sampler.price(level, level + 1), 1)
    rows += size * (sampler.look_price(first, None) if first else price)
    rows += keep * sampler.price(level + 1)
    scores += keep + (size if keep < size else 0)
    units, count = -(-rows // price), sampler.count
    return has_room(problem, units, level, level + 1, 0) and has_room(
        problem, scores, count, count, 1
    )
