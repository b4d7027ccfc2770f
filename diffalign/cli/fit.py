"""``diffalign fit``: what a technique must learn about a model before it can act there."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from diffalign.cli import arguments as a
from diffalign.cli import show
from diffalign.cli.options import Options
from diffalign.cli.problem import BadInput, checking, command

fit = typer.Typer(no_args_is_help=True, help="Fit what a technique must know about a model.")
LETTERS = {"g": "guided", "e": "estimated", "c": "conditional"}


@fit.command("linear-ag")
@command
@a.shared("prompt", "count", "output", steps=20, batch=16)
def linear_ag(
    options: Options,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Policy to write: PATH.json and PATH.safetensors.",
            rich_help_panel=a.WHERE,
        ),
    ],
    count: Annotated[
        int,
        typer.Option(
            "--count",
            "-c",
            help="Trajectories. Prompts: --prompts-file, else GenEval's.",
            rich_help_panel=a.WHAT,
        ),
    ] = 200,
    plan: Annotated[
        str | None,
        typer.Option(
            help=(
                "A letter per step: g guided, e estimated, c conditional; the paper's (gege...cc) "
                "if left out."
            ),
            rich_help_panel=a.HOW,
        ),
    ] = None,
    json: a.Json = False,
    quiet: a.Quiet = False,
) -> None:
    """Fit a LinearAG policy on plain guidance.

    It holds for this model, scheduler, steps, scale, size and negative prompt.
    """
    from diffalign.calibration.linear import fit_linear_ag
    from diffalign.cli import run
    from diffalign.cli.sample import prepare_sample, said_of
    from diffalign.guidance.linear_ag import Trajectories
    from diffalign.guidance.linear_policy import check_plan, files_of

    modes: Any = None if plan is None else [LETTERS.get(letter, letter) for letter in plan]
    if modes is not None:
        with checking():
            check_plan(modes, options.steps or 0)
    facts, weights = files_of(output)
    for path in (facts, weights):
        if path.is_dir():
            raise BadInput(f"--output: {str(path)!r} is a folder.")
    request = prepare_sample(options, count, output, Trajectories(None, None))
    scale = request.model.scale(request.scale)
    size = dict(zip(("height", "width"), request.size or ()))
    try:
        with show.progress(-(-count // request.batch) * request.steps, quiet) as bar:
            more, after = run.counting(request, bar("plain guidance") if bar else None)
            policy = fit_linear_ag(
                request.pipe,
                request.prompts,
                scale=scale,
                steps=request.steps,
                negative_prompt=request.negative_prompt or "",
                plan=modes,
                batch=request.batch,
                seed=request.seed,
                progress=after,
                **size,
                **more,
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing was written") from None
    policy.save(output)
    name = str(facts.with_suffix(""))
    nfe, full = len(policy.plan) + policy.plan.count("guided"), 2 * len(policy.plan)
    use = (
        f"diffalign generate {said_of(request, options)} --technique "
        f"{shlex.quote(f'linear-ag:policy={name}')}"
    )
    if json:
        data = {
            "policy": name,
            "files": [str(facts), str(weights)],
            "nfe": nfe,
            "nfe_cfg": full,
            "use": use,
            **policy.facts(),
        }
        show.text(show.to_json(data))
    elif not quiet:
        rows = [
            (i, 2 * i + 1, f"{policy.r2[i]:.5f}", f"{policy.gain[i]:.3f}")
            for i in sorted(policy.r2)
        ]
        title = (
            f"{request.model.name}: {policy.trajectories} trajectories, {nfe} NFE per image (CFG: "
            f"{full})"
        )
        heads = ["estimated step", "from predictions", "R²", "gain over conditional"]
        show.text(title)
        show.table(heads, rows, numbers=heads)
        show.text(f"{facts}\n{weights}\n{use}")
