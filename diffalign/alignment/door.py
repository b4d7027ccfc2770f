"""``align``: one door for every search and every noise optimiser."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch

from diffalign.alignment.driver import Drive, Status
from diffalign.alignment.forecast import Forecast, measure
from diffalign.alignment.order import (
    AnyMethod,
    AnyReward,
    Order,
    kernel_of,
    method_of,
    reward_of,
    target_of,
)
from diffalign.alignment.result import Ledger, Result, Story
from diffalign.alignment.scoring import Scorer, name_of
from diffalign.core import Budget, Meter, Technique
from diffalign.core.reward import Reward
from diffalign.core.search import Candidate
from diffalign.core.types import Pipeline


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
    announce: Callable[[Forecast], None] | None = None,
    stop: Callable[[], bool] | None = None,
    **call: Any,
) -> Result | list[Result]:
    """Spend runs of ``pipe`` on the image, or video, of ``prompt`` that ``reward`` likes best.

    ``method``: an object, or text like ``"best-of-n:n=8"``. ``reward``: a name, an object, or any
    function of images [B, 3, H, W] in [0, 1], or videos [B, T, 3, H, W], and prompts that gives
    scores [B]. ``budget``: limits of a prompt's run; None for methods that end by themselves.
    ``techniques`` act in every call. ``judges``: rewards that are reported and never optimised.
    ``ties``: rewards that settle equal scores. ``kernel``: how steps draw noise, for methods that
    branch, like ``da.Eta()``. ``batch``: images at once; four on a CPU and 16 elsewhere, halved
    where memory ends. ``folder``: the run is saved after each step and continues from there.
    ``show`` is called after each step, ``improved`` with each new best image, ``announce`` before
    the first run, with its seconds and memory as one image measures them. ``stop`` is asked before
    each evaluation, and a yes ends the run as Ctrl-C does. Other keywords go to the pipeline;
    ``clip``, frames [F, 3, H, W] in [0, 1], is what a video goes on from. Ctrl-C returns the best.
    A list of prompts gives one result each, with the whole budget each.
    Cost: the budget, one call for the result's image kept back from it; one grey image is scored.
    Raises: ValueError before anything runs, for what cannot work; ``UnsupportedModel`` for
    pipelines whose trajectories cannot be cut.
    """
    order = Order(
        pipe=pipe,
        method=method_of(method),
        reward=target_of(reward_of(reward)),
        budget=budget,
        techniques=tuple(techniques),
        judges=tuple(map(reward_of, judges)),
        ties=tuple(map(reward_of, ties)),
        kernel=kernel_of(kernel),
        batch=batch,
        seed=seed,
        call=call,
        show=show,
        improved=improved,
        stop=stop,
    )
    if announce is not None and prompt:
        announce(measure(order, prompt if isinstance(prompt, str) else prompt[0]))
    if isinstance(prompt, str):
        return search(order, prompt, folder)
    places = folders_of(folder, prompt)
    return [search(order, text, place) for text, place in zip(prompt, places, strict=True)]


def folders_of(folder: str | os.PathLike[str] | None, prompts: Sequence[str]) -> list[Path | None]:
    """The folder of each prompt's run inside ``folder``."""
    if folder is None:
        return [None] * len(prompts)
    slugs = (re.sub(r"[^a-z0-9]+", "-", text.lower())[:40].strip("-") for text in prompts)
    return [Path(folder) / f"{number:03d}-{slug}" for number, slug in enumerate(slugs)]


def search(order: Order, prompt: str, folder: str | os.PathLike[str] | None) -> Result:
    """Serve an order for one prompt; ``folder`` is where the run is saved, None for nowhere."""
    drive = order.drive(prompt, folder)
    try:
        drive.run()
        return _result(drive, list(map(order.suited, order.judges)))
    finally:
        drive.problem.progress.use(None)


def _best(drive: Drive) -> Candidate | None:
    """The result of the run; of several processes the best one, the lowest rank's of equal ones."""
    candidates = [c for c in drive.problem.progress.world.gather(drive.best) if c is not None]
    return max(candidates, key=lambda c: (c.score, *c.others), default=None)


def _result(drive: Drive, judges: Sequence[Reward]) -> Result:
    problem, meter = drive.problem, drive.problem.meter
    ranking = problem.progress.ranking
    best = _best(drive)
    if best is None:
        raise RuntimeError(f"{type(drive.method).__name__} ended without a finished image.")
    # the final call was kept back from the budget, which may be used up in seconds all the same
    meter.budget, meter.stop = Budget(), None
    tensor = problem.repeat(best.lineage)[0].detach().to("cpu", torch.float32)
    score = float(problem.score(tensor[None])[0])
    # none where a run was interrupted among drafts: then the result is the only finished image
    first = ranking.first or replace(best, image=tensor, score=score)
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
        story=Story(problem.progress.history, drive.log, drive.end, ranking.scored, ranking.equal),
        top=ranking.top,
        first=first,
        judges=verdicts,
        settings=drive.settings,
        tree=None if drive.state is None else drive.method.tree(drive.state),
        findings={} if drive.state is None else drive.method.findings(drive.state),
        repeat=repeat,
    )
