"""``align``: one door for every search and every noise optimiser."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch

from diffalign.alignment.checkpoint import Folder
from diffalign.alignment.driver import Drive, Status
from diffalign.alignment.problem import PipelineProblem, Progress, Setting
from diffalign.alignment.processes import World
from diffalign.alignment.result import Ledger, Result
from diffalign.alignment.scoring import Fit, Ranking, Scorer, name_of
from diffalign.core import Budget, BudgetExceeded, Meter, Technique
from diffalign.core.registry import KERNELS, METHODS, to_config
from diffalign.core.reward import Reward
from diffalign.core.search import Candidate, Method
from diffalign.core.seeds import seed_of
from diffalign.core.types import Json, Pipeline
from diffalign.core.values import plain
from diffalign.rewards import load
from diffalign.seams.swap import original_class

AnyReward = Reward | str
AnyMethod = Method[Any] | str


@overload
def align(
    pipe: Pipeline, prompt: str, *, method: AnyMethod, reward: AnyReward, **options: Any
) -> Result: ...
@overload
def align(
    pipe: Pipeline, prompt: Sequence[str], *, method: AnyMethod, reward: AnyReward, **options: Any
) -> list[Result]: ...


def align(
    pipe: Pipeline,
    prompt: str | Sequence[str],
    *,
    method: AnyMethod,
    reward: AnyReward,
    budget: Budget | None = None,
    techniques: Sequence[Technique] = (),
    judges: Sequence[AnyReward] = (),
    ties: Sequence[AnyReward] = (),
    kernel: Any = None,
    batch: int | None = None,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    show: Callable[[Status], None] | None = None,
    improved: Callable[[Candidate], None] | None = None,
    **call: Any,
) -> Result | list[Result]:
    """Spend runs of ``pipe`` on the image of ``prompt`` that ``reward`` likes best.

    ``method``: an object, or text like ``"best-of-n:n=8"``. ``reward``: a name of
    ``da.rewards.available()``, an object, or any function of images [B, 3, H, W] in [0, 1] and
    their prompts that returns scores [B]. ``budget``: limits of this prompt's run; None only for
    methods that end by themselves. ``techniques`` act in every call. ``judges``: rewards that
    are reported for the first image and the result, and never optimised. ``ties``: rewards that
    settle equal scores. ``kernel``: how the scheduler's steps draw noise, for methods that branch:
    ``da.Eta()``, ``da.FlowSDE()``, ``da.VPFlow()`` or text like ``"eta:eta=0.5"``. ``batch``:
    images at once, None for four on a CPU and 16 elsewhere, halved where memory ends. ``folder``:
    the run is saved there after each step and continues from there, also after it was killed.
    ``show`` is called after each step, ``improved`` with every new best image. The rest of the
    keywords go to the pipeline.

    For a list of prompts, one result each; each has the whole budget and its own folder inside
    ``folder``. Ctrl-C returns the best image so far.
    Cost: what the budget says; the image of the result takes one further call, kept back from
    the budget. The reward scores one grey image first.
    Raises: ValueError before anything is run, for names that are unknown (with the nearest
    ones), a method that cannot act here, a reward that cannot score, a budget too small for one
    image, and a folder of another run; ``UnsupportedModel`` where the pipeline cannot be cut.
    """
    if not isinstance(prompt, str):
        places = folders_of(folder, prompt)
        options: dict[str, Any] = {
            "method": method,
            "reward": _reward(reward),
            "budget": budget,
            "techniques": techniques,
            "judges": [_reward(judge) for judge in judges],
            "ties": [_reward(tie) for tie in ties],
            "kernel": kernel,
            "batch": batch,
            "seed": seed,
            "show": show,
            "improved": improved,
        }
        return [
            align(pipe, text, folder=place, **options, **call)
            for text, place in zip(prompt, places, strict=True)
        ]
    search = _method(method)
    world = World.current()
    meter = Meter(world.share(budget or Budget()))
    scorer = Scorer(_reward(reward), prompt, meter)
    ranking = Ranking(tuple(Scorer(_reward(tie), prompt, meter) for tie in ties))
    rng = torch.Generator().manual_seed(seed_of(prompt, 0, seed) ^ 0x5EED)
    progress = Progress(meter, ranking, scorer, Fit(batch or _usual(pipe)), rng)
    progress.improved, progress.world = improved, world
    if isinstance(kernel, str):
        (kernel,) = KERNELS.make(kernel)
    setting = Setting(pipe, prompt, tuple(techniques), call, kernel)
    problem = PipelineProblem(setting, prompt, seed, progress)
    progress.reserve = search.repeat_price(problem)
    _check(search, problem, budget)
    scorer.probe()
    settings = _settings(search, problem, scorer.reward)
    place = None if folder is None else Folder(_own(folder, world), settings)
    drive = Drive(search, problem, place, show)
    try:
        drive.run()
        return _result(drive, [_reward(judge) for judge in judges], settings)
    finally:
        progress.use(None)


def _own(folder: str | os.PathLike[str], world: World) -> Path:
    """The folder of this process."""
    return Path(folder) if world.size == 1 else Path(folder) / f"process-{world.rank}"


def _method(method: AnyMethod) -> Method[Any]:
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


def _reward(reward: AnyReward) -> Reward:
    if isinstance(reward, str):
        return load(reward)
    if not callable(reward):
        raise TypeError(
            "align(reward=...) takes a name, a reward, or a function of images and prompts; got "
            f"{reward!r}."
        )
    return reward


def _usual(pipe: Pipeline) -> int:
    """Images at once before memory has said anything."""
    return 4 if str(getattr(pipe, "device", "cpu")).startswith("cpu") else 16


def folders_of(folder: str | os.PathLike[str] | None, prompts: Sequence[str]) -> list[Path | None]:
    """The folder of each prompt's run inside ``folder``."""
    if folder is None:
        return [None] * len(prompts)
    slugs = (re.sub(r"[^a-z0-9]+", "-", text.lower())[:40].strip("-") for text in prompts)
    return [Path(folder) / f"{number:03d}-{slug}" for number, slug in enumerate(slugs)]


def _check(method: Method[Any], problem: PipelineProblem, budget: Budget | None) -> None:
    """Raise ValueError for what cannot work, before anything is run."""
    name = type(method).__name__
    if budget is None and not method.ends:
        raise ValueError(
            f"{name} goes on until its budget ends; give one, like budget=da.Budget(nfe=400). One "
            f"image takes {problem.sampler.price()} NFE."
        )
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
    try:
        problem.room(1)
    except BudgetExceeded as error:
        price, final = problem.sampler.price(), problem.progress.reserve
        raise ValueError(
            f"The budget is too small: a search needs one image ({price} NFE, one decode, one "
            f"score) and the final call ({final} NFE, one decode, one score)."
        ) from error


def _settings(method: Method[Any], problem: PipelineProblem, reward: Reward) -> Json:
    """What the run is: a folder belongs to these settings, and images carry them."""
    from diffalign import __version__

    setting = problem.setting
    return {
        "diffalign": __version__,
        "prompt": problem.prompt,
        "base_seed": problem.seed,
        "method": METHODS.to_config(method),
        "reward": name_of(reward),
        "techniques": [to_config(technique) for technique in setting.techniques],
        "kernel": None if setting.kernel is None else repr(setting.kernel),
        "pipeline": original_class(setting.pipe).__name__,
        "scheduler": original_class(setting.pipe.scheduler).__name__,
        "call": plain(_readable(setting.call)),
    }


def _readable(call: Mapping[str, Any]) -> Json:
    simple = (str, int, float, bool, type(None), list, tuple)
    return {
        name: value if isinstance(value, simple) else type(value).__name__
        for name, value in call.items()
    }


def _best(drive: Drive) -> Candidate | None:
    """The result of the run; of several processes the best one, the lowest rank's of equal ones."""
    best = drive.problem.best
    if drive.state is not None:
        best = drive.method.best(drive.problem, drive.state) or best
    candidates = [c for c in drive.problem.progress.world.gather(best) if c is not None]
    return max(candidates, key=lambda c: (c.score, *c.others), default=None)


def _result(drive: Drive, judges: Sequence[Reward], settings: Json) -> Result:
    problem, meter = drive.problem, drive.problem.meter
    ranking = problem.progress.ranking
    best, first = _best(drive), ranking.first
    if best is None or first is None:
        raise RuntimeError(f"{type(drive.method).__name__} ended without a finished image.")
    # the final call was kept back from the budget, which may be used up in seconds all the same
    meter.budget = Budget()
    tensor = problem.repeat(best.lineage)[0].detach().to("cpu", torch.float32)
    score = float(problem.score(tensor[None])[0])
    verdicts = {}
    for judge in judges:
        scorer = Scorer(judge, problem.prompt, Meter())
        pair = torch.cat([scorer(first.image[None]), scorer(tensor[None])]).tolist()
        verdicts[name_of(judge)] = (pair[0], pair[1])
    ledger = Ledger(
        nfe=meter.rows,
        evaluations=meter.evaluations,
        calls=meter.calls,
        decodes=meter.decodes,
        rewards=meter.rewards,
        backward=meter.backward,
        seconds=meter.seconds,
    )

    def repeat() -> torch.Tensor:
        try:
            return problem.repeat(best.lineage)
        finally:
            problem.progress.use(None)

    return Result(
        prompt=problem.prompt,
        tensor=tensor,
        score=score,
        lineage=best.lineage,
        ledger=ledger,
        history=problem.progress.history,
        top=ranking.top,
        first=first,
        judges=verdicts,
        end=drive.end,
        scored=ranking.scored,
        equal=ranking.equal,
        settings=settings,
        log=drive.log,
        tree=None if drive.state is None else drive.method.tree(drive.state),
        repeat=repeat,
    )
