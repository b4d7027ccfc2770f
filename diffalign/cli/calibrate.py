"""``diffalign calibrate``: a technique's value for a model, from a measurement on that model."""

import shlex
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from diffalign.cli import arguments, show
from diffalign.cli.problem import checking, command, complain

if TYPE_CHECKING:
    from diffalign.calibration.adaptive import Calibration

calibrate = typer.Typer(no_args_is_help=True, help="Measure the value of an option on a model.")


@calibrate.command("adaptive-guidance")
@command
@arguments.shared(
    without=("prompt", "technique"),
    help={
        "count": "Images. Prompts: --prompts-file, else GenEval's.",
        "output": "Preset file (.json) to write; its plot is beside it (.png).",
    },
    batch=16,
    count=64,
    output=arguments.REQUIRED,
)
def adaptive_guidance(
    options: arguments.Options,
    saving: Annotated[
        float,
        typer.Option(
            help="Share of plain guidance's evaluations to save, mean over images.",
            rich_help_panel=arguments.HOW,
        ),
    ] = 0.25,
    space: Annotated[
        Literal["eps", "x0"],
        typer.Option(
            help="Compare noise predictions or denoised images.", rich_help_panel=arguments.HOW
        ),
    ] = "eps",
) -> None:
    """Choose AdaptiveGuidance's threshold: the highest that saves --saving, and how far its images
    are from plain guidance."""
    from diffalign.calibration.adaptive import calibrate_adaptive_guidance, check_saving
    from diffalign.calibration.curves import Recording
    from diffalign.cli.measurement import prepare_measurement
    from diffalign.cli.request import check_free

    target, picture = files_of(options.output)
    check_free(target, picture)
    request = prepare_measurement(options, Recording(space=space, sink=lambda index, cosine: None))
    model = request.model
    with checking():
        check_saving(saving, model.steps, int(getattr(model.pipe.scheduler, "order", 1)))
    try:
        with show.progress(2 * request.calls * model.steps, options.quiet) as bar:
            calibration = calibrate_adaptive_guidance(
                model.pipe,
                request.prompts,
                scale=model.scale,
                steps=model.steps,
                saving=saving,
                space=space,
                negative_prompt=options.negative_prompt or "",
                batch=request.batch,
                seed=options.seed,
                step=bar("plain, then adaptive"),
                **model.size,
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing was written") from None
    source = source_of(options, calibration)
    write(target, picture, calibration, source)
    warn_of_noise(calibration)
    report(options, calibration, source)


def files_of(output: Path) -> tuple[Path, Path]:
    """The preset file and its plot."""
    target = output if output.suffix == ".json" else output.with_name(output.name + ".json")
    return target, target.with_suffix(".png")


def source_of(options: arguments.Options, calibration: "Calibration") -> str:
    """Where the value comes from, in the words of a preset."""
    from diffalign import __version__

    about = f"{options.count} prompts{'' if options.prompts_file else ' of GenEval'}"
    about += f", seeds from {options.seed}"
    about += f", {options.size} pixels" if options.size else ""
    about += f", negative prompt {options.negative_prompt!r}" if options.negative_prompt else ""
    return (
        f"diffalign {__version__} calibrate, {date.today().isoformat()}, {options.model}: {about}; "
        f"{100 * (1 - calibration.nfe / calibration.nfe_cfg):.0f}% of the evaluations saved, mean "
        f"absolute pixel difference {float(calibration.difference.mean()):.4f}"
    )


def write(target: Path, picture: Path, calibration: "Calibration", source: str) -> None:
    """Preset and plot, both or none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(target.name + ".part")
    sketch = picture.with_name(picture.name + ".part")
    calibration.plot().save(sketch, format="PNG")
    draft.write_text(show.to_json(calibration.preset(source)) + "\n", encoding="utf-8")
    sketch.replace(picture)
    draft.replace(target)


def warn_of_noise(calibration: "Calibration") -> None:
    """A warning where most images latch at the first step that may."""
    curves = calibration.curves
    latches = curves.latches(calibration.threshold)
    early = int((latches == curves.minimum - 1).sum())
    latched = int((latches < curves.cosine.shape[1]).sum())
    if 2 * early > latched:
        complain(
            f"{early} of {latched} images that latch do so at step {curves.minimum}, the first "
            "that may; in pure noise branches can agree without meaning it. Look at the plot, and "
            "try the other --space.",
            "warning",
        )


def report(options: arguments.Options, calibration: "Calibration", source: str) -> None:
    """Say what was chosen and how to use it."""
    from diffalign.core.presets import VARIABLE

    target, picture = files_of(options.output)
    use = f"{VARIABLE}={shlex.quote(str(target))}"
    apart, full = float(calibration.difference.mean()), calibration.nfe_cfg
    if options.json:
        names = ("threshold", "nfe", "saving", "latched")
        result = {
            "threshold": calibration.threshold,
            "nfe": calibration.nfe,
            "nfe_cfg": full,
            "difference": apart,
            "when": calibration.when,
            "source": source,
            "table": [dict(zip(names, row)) for row in calibration.table()],
            "preset": str(target),
            "plot": str(picture),
            "use": use,
        }
        show.text(show.to_json(result))
    elif not options.quiet:
        rows = []
        for threshold, nfe, share, latched in calibration.table():
            best = threshold == calibration.threshold
            rows.append(
                [
                    f"{threshold:g}{' *' if best else ''}",
                    f"{nfe:.1f}",
                    f"{100 * share:.0f}%",
                    f"{latched} of {options.count}",
                    f"{apart:.4f}" if best else "",
                ]
            )
        heads = ["threshold", "NFE/image", "saved", "images that latch", "pixel difference"]
        show.text(
            f"{options.model}: plain guidance costs {full} NFE per image; * chosen, "
            f"{calibration.nfe:.1f} NFE measured"
        )
        show.table(heads, rows, numbers=heads)
        show.text(
            f"{target}\n{picture}\n{use} makes --technique adaptive-guidance use it on this model"
        )
