"""An order for a search: everything that ``align`` was given, checked before anything runs."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.alignment.checkpoint import Folder
from diffalign.alignment.driver import Drive, Status
from diffalign.alignment.identity import marks_of, settings_of
from diffalign.alignment.problem import PipelineProblem
from diffalign.alignment.processes import World
from diffalign.alignment.progress import Progress
from diffalign.alignment.scoring import Fit, Ranking, Scorer, name_of
from diffalign.alignment.setting import Setting
from diffalign.core import Budget, Meter, Technique, UnsupportedModel
from diffalign.core.registry import METHODS
from diffalign.core.reward import Reward
from diffalign.core.search import Candidate, Method
from diffalign.core.seeds import seed_of
from diffalign.core.types import Keywords, Pipeline
from diffalign.rewards import HeldOut
from diffalign.rewards.video import for_videos
from diffalign.rewards.weighted import load_sum
from diffalign.seams.swap import original_class
from diffalign.seams.trajectory.kernels import Eta, Kernel, check_kernel
from diffalign.seams.trajectory.sampler import PipelineSampler
from diffalign.search.video.choice import extends

AnyReward = Reward | str
AnyMethod = Method[Any] | str


@dataclass(frozen=True, slots=True)
class Order:
    """How to search, for any prompt."""

    pipe: Pipeline
    method: Method[Any]
    reward: Reward
    budget: Budget | None
    techniques: tuple[Technique, ...]
    judges: tuple[Reward, ...]
    ties: tuple[Reward, ...]
    kernel: Kernel | None
    batch: int | None
    seed: int
    # further arguments of the pipeline, and ``clip``
    call: Mapping[str, Any]
    show: Callable[[Status], None] | None = None
    improved: Callable[[Candidate], None] | None = None
    stop: Callable[[], bool] | None = None
    world: World = field(default_factory=World.current)

    def drive(self, prompt: str, folder: str | os.PathLike[str] | None) -> Drive:
        """The run for one prompt, checked and not begun.

        Raises: ValueError and ``UnsupportedModel`` for what cannot work.
        """
        meter = Meter(self.world.share(self.budget or Budget()), stop=self.stop)
        scorer = Scorer(self.suited(self.reward), prompt, meter)
        ranking = Ranking(tuple(Scorer(self.suited(tie), prompt, meter) for tie in self.ties))
        rng = torch.Generator().manual_seed(seed_of(prompt, 0, self.seed) ^ 0x5EED)
        fit = Fit(self.batch or _usual(self.pipe))
        progress = Progress(meter, ranking, scorer, fit, rng)
        progress.improved, progress.world = self.improved, self.world
        setting = self.setting(prompt)
        problem = PipelineProblem(setting, prompt, self.seed, progress)
        progress.reserve = self.method.repeat_price(problem)
        _check(self.method, problem, self.budget)
        for judge in (scorer, *ranking.ties, *self.scorers(prompt)):
            judge.probe(self.frames)
        settings = settings_of(self.method, problem, scorer.reward)
        place = None
        if folder is not None:
            marks = marks_of(self.pipe, self.reward, self.ties)
            place = Folder(_own(folder, self.world), settings | marks)
        return Drive(self.method, problem, settings, place, self.show)

    def scorers(self, prompt: str) -> list[Scorer]:
        """The judges, whose scores cost nothing of the budget."""
        return [Scorer(self.suited(judge), prompt, Meter()) for judge in self.judges]

    def setting(self, prompt: str) -> Setting:
        """How the pipeline is called: chunk after chunk where method and pipeline do."""
        setting = Setting(
            self.pipe, prompt, self.techniques, self.arguments, self.kernel, clip=self.clip
        )
        return in_chunks(setting, self.method)

    @property
    def arguments(self) -> Keywords:
        """Of the pipeline alone."""
        return {name: value for name, value in self.call.items() if name != "clip"}

    @property
    def clip(self) -> Tensor | None:
        """Frames [F, 3, H, W] in [0, 1] that the video goes on from, None for none.

        Raises: TypeError for anything else.
        """
        clip = self.call.get("clip")
        if clip is not None and not isinstance(clip, Tensor):
            raise TypeError(
                "align(clip=...) takes frames as a tensor [F, 3, H, W] in [0, 1]; got "
                f"{type(clip).__name__}."
            )
        return clip

    @property
    def frames(self) -> int | None:
        """Frames of the pipeline's video, None for a pipeline of images."""
        return frames_of(original_class(self.pipe), self.call)

    def suited(self, reward: Reward) -> Reward:
        """A reward of images as one of videos, where the pipeline makes those."""
        return reward if self.frames is None else for_videos(reward)


def in_chunks(setting: Setting, method: Method[Any]) -> Setting:
    """The setting, chunk after chunk where method and pipeline do.

    Raises: ValueError for a clip where they do not.
    """
    cls = original_class(setting.pipe)
    can = method.chunks != "never" and extends(cls)
    if method.chunks == "can" and can:
        try:
            replace(setting, clip=None).sampler(Meter())
            can = False
        except UnsupportedModel:
            pass
    if setting.clip is not None and not can:
        who = cls if method.chunks != "never" else type(method)
        raise ValueError(
            "clip=... needs a pipeline and a method that go on from a clip; "
            f"{who.__name__} does not. Use linear-search or tree-of-frames on a pipeline that "
            "makes a video chunk after chunk."
        )
    return replace(setting, chunked=can)


def usual_kernel(setting: Setting, method: Method[Any]) -> str | None:
    """The name of a kernel by which the method branches, where the scheduler draws no noise.

    None where the method or the scheduler needs none, or where none can act.
    """
    if not method.branches or setting.kernel is not None:
        return None
    sampler = in_chunks(setting, method).sampler(Meter())
    if not isinstance(sampler, PipelineSampler) or sampler.branches:
        return None
    try:
        check_kernel(Eta(), sampler.grid)
    except UnsupportedModel:
        return None
    return "eta"


def frames_of(cls: type, call: Mapping[str, object]) -> int | None:
    """Frames of a pipeline's videos by its call, None for a pipeline of images; at most 16."""
    signature = inspect.signature(cls.__call__)  # type: ignore[operator]
    parameter = signature.parameters.get("num_frames")
    if parameter is None:
        return None
    frames = call.get("num_frames") or parameter.default
    return min(frames, 16) if isinstance(frames, int) else 16


def _own(folder: str | os.PathLike[str], world: World) -> Path:
    """The folder of this process."""
    return Path(folder) if world.size == 1 else Path(folder) / f"process-{world.rank}"


def method_of(method: AnyMethod) -> Method[Any]:
    if isinstance(method, str):
        parts = METHODS.make(method)
        if len(parts) != 1:
            raise ValueError(f"align(method={method!r}) must name one method; got {len(parts)}.")
        return parts[0]
    if not isinstance(method, Method):
        raise TypeError(
            f"align(method=...) takes a method like da.BestOfN(8) or its text; got {method!r}. "
            "`diffalign methods` lists them."
        )
    return method


def reward_of(reward: AnyReward) -> Reward:
    if isinstance(reward, str):
        return load_sum(reward)
    if not callable(reward):
        raise TypeError(
            "align(reward=...) takes a name, a reward, or a function of images and prompts; got "
            f"{reward!r}."
        )
    return reward


def target_of(reward: Reward) -> Reward:
    """A reward that may be optimised. Raises: ValueError for one that is held out."""
    if isinstance(reward, HeldOut):
        raise ValueError(
            f"align(reward=...): {reward.name} is reported and never optimised; give it as one of "
            "judges=[...]."
        )
    return reward


def _usual(pipe: Pipeline) -> int:
    """Images at once before memory has said anything."""
    return 4 if str(getattr(pipe, "device", "cpu")).startswith("cpu") else 16


def _check(method: Method[Any], problem: PipelineProblem, budget: Budget | None) -> None:
    """Raise ValueError for what cannot work, before anything is run."""
    name = type(method).__name__
    if budget is None and not method.ends:
        raise ValueError(
            f"{name} goes on until its budget ends; give one, like budget=da.Budget(nfe=400). One "
            f"image takes {problem.sampler.price()} NFE."
        )
    if isinstance(problem.sampler, PipelineSampler):
        check_kernel(problem.sampler.kernel, problem.sampler.grid)
    deterministic = problem.sampler.deterministic if method.branches else None
    if deterministic is not None:
        raise ValueError(f"{name} needs children that differ: {deterministic}")
    if method.needs_gradient and not getattr(problem.reward, "differentiable", False):
        raise ValueError(
            f"{name} needs a reward with gradient, and {name_of(problem.reward)} has none."
        )
    reason = method.refuses(problem)
    if reason is not None:
        raise ValueError(f"{name} cannot act here: {reason}")
    least, limits = method.least(problem), problem.meter.budget
    needs = {
        "nfe": least.rows + problem.progress.reserve,
        "decodes": least.decodes + 1,
        "rewards": least.scores + 1,
        "backward": least.backward,
    }
    if any((limit := getattr(limits, key)) is not None and limit < needs[key] for key in needs):
        need = ", ".join(f"{key}={number}" for key, number in needs.items() if number)
        raise ValueError(
            f"The budget is too small: {name} needs at least {need}, the final call included. One "
            f"image takes {problem.sampler.price()} NFE."
        )
