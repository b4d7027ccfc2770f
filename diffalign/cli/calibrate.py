"""``diffalign calibrate``: a technique's value for a model, from a measurement on that model."""

import shlex
from datetime import date
from pathlib import Path
from typing import Annotated, Literal

import typer

from diffalign.cli import arguments as a
from diffalign.cli import show
from diffalign.cli.options import Options, free
from diffalign.cli.problem import checking, command, complain

calibrate = typer.Typer(no_args_is_help=True, help="Measure the value of an option on a model.")


@calibrate.command("adaptive-guidance")
@command
@a.shared("prompt", "count", "output", batch=16)
def adaptive_guidance(
    options: Options,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Preset file (.json) to write; its plot is beside it (.png).",
            rich_help_panel=a.WHERE,
        ),
    ],
    count: Annotated[
        int,
        typer.Option(
            "--count",
            "-c",
            help="Images. Prompts: --prompts-file, else GenEval's.",
            rich_help_panel=a.WHAT,
        ),
    ] = 64,
    saving: Annotated[
        float,
        typer.Option(
            help="Share of plain guidance's evaluations to save, mean over images.",
            rich_help_panel=a.HOW,
        ),
    ] = 0.25,
    space: Annotated[
        Literal["eps", "x0"],
        typer.Option(help="Compare noise predictions or denoised images.", rich_help_panel=a.HOW),
    ] = "eps",
    json: a.Json = False,
    quiet: a.Quiet = False,
) -> None:
    """Choose AdaptiveGuidance's threshold: the highest that saves --saving, and how far its images
    are from plain guidance."""
    from diffalign import __version__
    from diffalign.calibration.adaptive import calibrate_adaptive_guidance, check_saving
    from diffalign.calibration.curves import Recording
    from diffalign.cli import run
    from diffalign.cli.sample import prepare_sample
    from diffalign.core.presets import VARIABLE

    target = output if output.suffix == ".json" else output.with_name(output.name + ".json")
    picture = target.with_suffix(".png")
    free(target, picture)
    request = prepare_sample(
        options, count, target, Recording(None, space, lambda index, cosine: None)
    )
    with checking():
        check_saving(saving, request.steps, int(getattr(request.pipe.scheduler, "order", 1)))
    scale = request.model.scale(request.scale)
    size = dict(zip(("height", "width"), request.size or ()))
    try:
        with show.progress(2 * -(-count // request.batch) * request.steps, quiet) as bar:
            more, after = run.counting(request, bar("plain, then adaptive") if bar else None)
            found = calibrate_adaptive_guidance(
                request.pipe,
                request.prompts,
                scale=scale,
                steps=request.steps,
                saving=saving,
                space=space,
                negative_prompt=request.negative_prompt or "",
                batch=request.batch,
                seed=request.seed,
                progress=after,
                **size,
                **more,
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing was written") from None
    apart, full = float(found.difference.mean()), 2 * sum(found.curves.evaluations)
    about = (
        f"{count} prompts{'' if options.prompts_file else ' of GenEval'}, seeds from {request.seed}"
    )
    about += f", {options.size} pixels" if options.size else ""
    about += f", negative prompt {options.negative_prompt!r}" if options.negative_prompt else ""
    result = (
        f"{100 * (1 - found.nfe / full):.0f}% of the evaluations saved, mean absolute pixel "
        f"difference {apart:.4f}"
    )
    source = (
        f"diffalign {__version__} calibrate, {date.today().isoformat()}, {request.model.name}: "
        f"{about}; {result}"
    )
    draft, sketch = (
        target.with_name(target.name + ".part"),
        picture.with_name(picture.name + ".part"),
    )
    found.plot().save(sketch, format="PNG")
    draft.write_text(show.to_json(found.preset(source)) + "\n", encoding="utf-8")
    sketch.replace(picture)
    draft.replace(target)
    latches = found.curves.latches(found.threshold)
    early, latched = (
        int((latches == found.curves.minimum - 1).sum()),
        int((latches < found.curves.cosine.shape[1]).sum()),
    )
    if 2 * early > latched:
        complain(
            f"{early} of {latched} images that latch do so at step {found.curves.minimum}, the "
            "first that may; in pure noise branches can "
            "agree without meaning it. Look at the plot, and try the other --space.",
            "warning",
        )
    use = f"{VARIABLE}={shlex.quote(str(target))}"
    if json:
        chosen = {
            "threshold": found.threshold,
            "nfe": found.nfe,
            "nfe_cfg": full,
            "difference": apart,
            "when": found.when,
            "source": source,
        }
        table = [
            {"threshold": t, "nfe": nfe, "saving": saved, "latched": latched}
            for t, nfe, saved, latched in found.table()
        ]
        show.text(
            show.to_json(
                {**chosen, "table": table, "preset": str(target), "plot": str(picture), "use": use}
            )
        )
    elif not quiet:
        rows = []
        for t, nfe, saved, latched in found.table():
            mine = t == found.threshold
            cells = [
                f"{t:g}{' *' if mine else ''}",
                f"{nfe:.1f}",
                f"{100 * saved:.0f}%",
                f"{latched} of {count}",
            ]
            rows.append([*cells, f"{apart:.4f}" if mine else ""])
        title = (
            f"{request.model.name}: plain guidance costs {full} NFE per image; * chosen, "
            f"{found.nfe:.1f} NFE measured"
        )
        heads = ["threshold", "NFE/image", "saved", "images that latch", "pixel difference"]
        show.text(title)
        show.table(heads, rows, numbers=heads)
        show.text(
            f"{target}\n{picture}\n{use} makes --technique adaptive-guidance use it on this model"
        )
