"""``diffalign fit``: what a technique must learn about a model before it can act there."""

import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffalign.cli import arguments, show
from diffalign.cli.problem import BadInput, checking, command

if TYPE_CHECKING:
    from diffalign.cli.request import Request
    from diffalign.guidance.linear_policy import LinearPolicy

fit = typer.Typer(no_args_is_help=True, help="Fit what a technique must know about a model.")
LETTERS = {"g": "guided", "e": "estimated", "c": "conditional"}


@fit.command("linear-ag")
@command
@arguments.shared(
    without=("prompt", "technique"),
    help={
        "count": "Trajectories. Prompts: --prompts-file, else GenEval's.",
        "output": "Policy to write: PATH.json and PATH.safetensors.",
    },
    steps=20,
    batch=16,
    count=200,
    output=arguments.REQUIRED,
)
def linear_ag(
    options: arguments.Options,
    plan: Annotated[
        str | None,
        typer.Option(
            help=(
                "A letter per step: g guided, e estimated, c conditional; the paper's (gege...cc) "
                "if left out."
            ),
            rich_help_panel=arguments.HOW,
        ),
    ] = None,
) -> None:
    """Fit a LinearAG policy on plain guidance.

    It holds for this model, scheduler, steps, scale, size and negative prompt.
    """
    from diffalign.calibration.linear import fit_linear_ag
    from diffalign.cli.measurement import prepare_measurement
    from diffalign.guidance.linear_ag import Trajectories
    from diffalign.guidance.linear_policy import check_plan, files_of

    modes: Any = None if plan is None else [LETTERS.get(letter, letter) for letter in plan]
    if modes is not None:
        with checking():
            check_plan(modes, options.steps or 0)
    facts, weights = files_of(options.output)
    for path in (facts, weights):
        if path.is_dir():
            raise BadInput(f"--output: {str(path)!r} is a folder.")
    request = prepare_measurement(options, Trajectories())
    model = request.model
    try:
        with show.progress(request.calls * model.steps, options.quiet) as bar:
            policy = fit_linear_ag(
                model.pipe,
                request.prompts,
                scale=model.scale,
                steps=model.steps,
                negative_prompt=options.negative_prompt or "",
                plan=modes,
                batch=request.batch,
                seed=options.seed,
                step=bar("plain guidance"),
                **model.size,
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing was written") from None
    options.output.parent.mkdir(parents=True, exist_ok=True)
    policy.save(options.output)
    report(options, request, policy)


def report(options: arguments.Options, request: "Request", policy: "LinearPolicy") -> None:
    """Say what was fitted and how to use it."""
    from diffalign.cli.measurement import repeated
    from diffalign.guidance.linear_policy import files_of

    facts, weights = files_of(options.output)
    name = str(facts.with_suffix(""))
    nfe, full = len(policy.plan) + policy.plan.count("guided"), 2 * len(policy.plan)
    technique = shlex.quote(f"linear-ag:policy={name}")
    use = f"diffalign generate {repeated(request, options)} --technique {technique}"
    if options.json:
        data = {
            "policy": name,
            "files": [str(facts), str(weights)],
            "nfe": nfe,
            "nfe_cfg": full,
            "use": use,
            **policy.facts(),
        }
        show.text(show.to_json(data))
    elif not options.quiet:
        rows = [
            (i, 2 * i + 1, f"{policy.r2[i]:.5f}", f"{policy.gain[i]:.3f}")
            for i in sorted(policy.r2)
        ]
        heads = ["estimated step", "from predictions", "R²", "gain over conditional"]
        show.text(
            f"{request.model.name}: {policy.trajectories} trajectories, {nfe} NFE per image (CFG: "
            f"{full})"
        )
        show.table(heads, rows, numbers=heads)
        show.text(f"{facts}\n{weights}\n{use}")
