"""``align``: one door for every search and every noise optimiser."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from diffalign.alignment.arguments import (
    AnyKernel,
    budget_of,
    check_call,
    check_run,
    kernel_of,
    prompts_of,
    rewards_of,
    seed_in,
    techniques_of,
)
from diffalign.alignment.driver import Drive, Status
from diffalign.alignment.forecast import Forecast, measure
from diffalign.alignment.order import (
    AnyMethod,
    AnyReward,
    Order,
    method_of,
    reward_of,
    target_of,
)
from diffalign.alignment.progress import Moment
from diffalign.alignment.result import Ledger, Result, Story
from diffalign.alignment.scoring import Scorer, name_of
from diffalign.core import Budget, Cancelled, Technique
from diffalign.core.errors import warn_once
from diffalign.core.search import Candidate
from diffalign.core.types import Pipeline

FAR = 0.01
"""Difference of the final call's score to the one that was found, in parts of it, that is said."""


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
    budget: Budget | str | None = None,
    techniques: Technique | str | Sequence[Technique | str] = (),
    judges: AnyReward | Sequence[AnyReward] = (),
    ties: AnyReward | Sequence[AnyReward] = (),
    kernel: AnyKernel | None = None,
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
    scores [B]. ``budget``: limits of a prompt's run, or text like ``"nfe=400"``; None for methods
    that end by themselves. ``techniques`` act in every call. ``judges``: rewards that are reported
    and never optimised. ``ties``: rewards that settle equal scores. ``kernel``: how steps draw
    noise, for methods that branch, like ``da.Eta()``. ``batch``: images at once; four on a CPU and
    16 elsewhere, halved where memory ends. ``folder``: the run is saved after each step and
    continues from there. ``show`` is called after each step, ``improved`` with each new best image,
    ``announce`` before the first run, with its seconds and memory as one image measures them.
    ``stop`` is asked before each evaluation, and a yes ends the run as Ctrl-C does. Other keywords
    go to the pipeline; ``clip``, frames [F, 3, H, W] in [0, 1], is what a video goes on from.
    Several prompts give one result each, each with the whole budget. Ctrl-C returns what is there.
    Cost: the budget, one call for the result's image kept back from it; two grey images are scored.
    Raises: ValueError before anything runs, for what cannot work; ``UnsupportedModel`` for
    pipelines whose trajectories cannot be cut.
    """
    texts = prompts_of(prompt)
    check_run(batch, folder, show=show, improved=improved, announce=announce, stop=stop)
    check_call(pipe, call, inspect.signature(align).parameters)
    order = Order(
        pipe=pipe,
        method=method_of(method),
        reward=target_of(reward_of(reward)),
        budget=budget_of(budget),
        techniques=techniques_of(techniques),
        judges=rewards_of("judges", judges),
        ties=rewards_of("ties", ties),
        kernel=kernel_of(kernel),
        batch=batch,
        seed=seed_in(seed),
        call=call,
        show=show,
        improved=improved,
        stop=stop,
    )
    if announce is not None:
        announce(measure(order, texts[0]))
    return search(order, prompt, folder) if isinstance(prompt, str) else _each(order, texts, folder)


def _each(
    order: Order, prompts: Sequence[str], folder: str | os.PathLike[str] | None
) -> list[Result]:
    """A result for each prompt; an interrupt returns those so far."""
    results: list[Result] = []
    for text, place in zip(prompts, folders_of(folder, prompts), strict=True):
        try:
            results.append(search(order, text, place))
        except (KeyboardInterrupt, Cancelled):
            if not results:
                raise
            break
        if results[-1].end.startswith("interrupted"):
            break
    return results


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
        return _result(drive, order.scorers(prompt))
    finally:
        drive.problem.progress.use(None)


def _best(drive: Drive) -> Candidate | None:
    """The result of the run; of several processes the best one, the lowest rank's of equal ones."""
    candidates = [c for c in drive.problem.progress.world.gather(drive.best) if c is not None]
    return max(candidates, key=lambda c: (c.score, *c.others), default=None)


def _final(drive: Drive, best: Candidate) -> Candidate:
    """The image of a plain call with its score; the one that was found where Ctrl-C ends that."""
    problem = drive.problem
    # the final call was kept back from the budget, which may be used up in seconds all the same
    problem.meter.budget, problem.meter.stop = Budget(), None
    try:
        image = problem.repeat(best.lineage)
        score = float(problem.score(image)[0])
    except KeyboardInterrupt:
        drive.end = "interrupted before the final call"
        return best
    if best is problem.progress.ranking.best and abs(score - best.score) > FAR * max(
        1.0, abs(best.score)
    ):
        warn_once(
            f"The image of the final call has the score {score:.4g}, and the search found "
            f"{best.score:.4g}. Was the pipeline changed meanwhile?"
        )
    return replace(best, image=image[0].detach().to("cpu", torch.float32), score=score)


def _verdicts(
    judges: Sequence[Scorer], pair: tuple[Tensor, Tensor]
) -> dict[str, tuple[float, float]]:
    """What judges say of two images; one that fails is left out, since the run is paid for."""
    verdicts = {}
    for judge in judges:
        name = name_of(judge.reward)
        try:
            first, last = (float(judge(image[None])[0]) for image in pair)
        except Exception as error:
            warn_once(f"The judge {name} was left out: {error}")
        except KeyboardInterrupt:
            break
        else:
            verdicts[name] = (first, last)
    return verdicts


def _result(drive: Drive, judges: Sequence[Scorer]) -> Result:
    problem, meter = drive.problem, drive.problem.meter
    ranking = problem.progress.ranking
    best = _best(drive)
    if best is None:
        raise RuntimeError(f"{type(drive.method).__name__} ended without a finished image.")
    final = _final(drive, best)
    # none where a run was interrupted among drafts: then the result is the only finished image
    first = ranking.first or final
    verdicts = _verdicts(judges, (first.image, final.image))
    moment = Moment(meter.rows, meter.evaluations, meter.seconds, final.score)
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
        tensor=final.image,
        score=final.score,
        lineage=best.lineage,
        ledger=ledger,
        story=Story(
            problem.progress.history or [moment],
            drive.log,
            drive.end,
            ranking.scored,
            ranking.equal,
        ),
        top=ranking.top or [final],
        first=first,
        judges=verdicts,
        settings=drive.settings,
        tree=None if drive.state is None else drive.method.tree(drive.state),
        findings={} if drive.state is None else drive.method.findings(drive.state),
        repeat=repeat,
    )
