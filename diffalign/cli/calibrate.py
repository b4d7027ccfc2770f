"""``diffalign calibrate``: a technique's value for a model, from a measurement on that model."""

import json
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from diffalign.cli import arguments, show
from diffalign.cli.problem import BadInput, checking, command, complain

if TYPE_CHECKING:
    from diffalign.calibration.adaptive import Calibration
    from diffalign.calibration.guarantee import Correct, Guarantee
    from diffalign.calibration.policy import Policy
    from diffalign.cli.request import Request
    from diffalign.core.types import Keywords

calibrate = typer.Typer(no_args_is_help=True, help="Measure the value of an option on a model.")


Saving = Annotated[
    float | None,
    typer.Option(
        help="Share of plain guidance's evaluations to save, mean over images; .25 if neither "
        "this nor --loss is given.",
        rich_help_panel=arguments.HOW,
    ),
]
Loss = Annotated[
    float | None,
    typer.Option(
        help="Instead: save as much as loses at most this on average, with a guarantee.",
        rich_help_panel=arguments.HOW,
    ),
]
Confidence = Annotated[
    float, typer.Option(help="How sure --loss is to hold.", rich_help_panel=arguments.HOW)
]
Measure = Annotated[
    Literal["pixels", "verdict"],
    typer.Option(
        help="What --loss bounds: the mean absolute difference of pixels, or the share of "
        "images that were right and are not (embedded models).",
        rich_help_panel=arguments.HOW,
    ),
]
Space = Annotated[
    Literal["eps", "x0"],
    typer.Option(
        help="Compare noise predictions or denoised images.", rich_help_panel=arguments.HOW
    ),
]


@dataclass(frozen=True, slots=True)
class Goal:
    """What the threshold is chosen by."""

    # None where the loss decides
    saving: float | None
    # None where the saving decides
    loss: float | None
    confidence: float
    # space in which the branches are compared
    space: Literal["eps", "x0"]

    def check(self, count: int, steps: int, order: int) -> None:
        """Raise ValueError where the goal cannot be reached with so many images and steps."""
        from diffalign.calibration.adaptive import check_saving
        from diffalign.calibration.guarantee import check_guarantee

        if self.saving is not None:
            check_saving(self.saving, steps, order)
        if self.loss is not None:
            check_guarantee(count, self.loss, self.confidence)


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
    saving: Saving = None,
    loss: Loss = None,
    confidence: Confidence = 0.95,
    measure: Measure = "pixels",
    space: Space = "eps",
) -> None:
    """Choose AdaptiveGuidance's threshold: the highest that saves --saving, or the lowest that
    surely loses no more than --loss; and say how far its images are from plain guidance."""
    from diffalign.calibration.curves import Recording
    from diffalign.cli.measurement import prepare_measurement
    from diffalign.cli.request import check_free

    target, picture = files_of(options.output)
    check_free(target, picture)
    if saving is not None and loss is not None:
        raise BadInput("--saving and --loss exclude each other; give one.")
    goal = Goal(0.25 if saving is loss else saving, loss, confidence, space)
    request = prepare_measurement(options, Recording(space=space, sink=lambda index, cosine: None))
    scheduler = request.model.pipe.scheduler
    with checking():
        goal.check(options.count, request.model.steps, int(getattr(scheduler, "order", 1)))
    judge = measured_by(request) if loss is not None and measure == "verdict" else None
    try:
        with show.progress(2 * request.calls * request.model.steps, options.quiet) as bar:
            step = bar("plain, then adaptive")
            calibration, guarantee = calibrated(request, options, goal, judge, step)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing was written") from None
    source = source_of(options, calibration, guarantee)
    write(target, picture, calibration, source)
    warn_of_noise(calibration)
    report(options, calibration, source, guarantee)


def calibrated(
    request: "Request",
    options: arguments.Options,
    goal: Goal,
    judge: "Correct | None",
    step: Callable[[], None] | None,
) -> tuple["Calibration", "Guarantee | None"]:
    """The threshold, and what is promised of it where the loss decides."""
    from diffalign.calibration.adaptive import calibrate_adaptive_guidance
    from diffalign.calibration.guarantee import certify_adaptive_guidance

    model = request.model
    call: Keywords = {
        "scale": model.scale,
        "steps": model.steps,
        "space": goal.space,
        "negative_prompt": options.negative_prompt or "",
        "batch": request.batch,
        "seed": options.seed,
        "step": step,
        **model.size,
    }
    if goal.loss is None:
        call["saving"] = goal.saving
        return calibrate_adaptive_guidance(model.pipe, request.prompts, **call), None
    call |= {"loss": goal.loss, "confidence": goal.confidence, "measure": judge}
    with checking():
        return certify_adaptive_guidance(model.pipe, request.prompts, **call)


def measured_by(request: "Request") -> "Correct":
    """Verdicts of the judge of the request's embedded model."""
    from diffalign.calibration.guarantee import Correct
    from diffalign.cli.comparison import judge_of

    judge, reason = judge_of(request.model, request.prompts)
    if judge is None:
        raise BadInput(f"--measure verdict cannot be used here: {reason} Measure pixels instead.")
    return Correct(judge)


def files_of(output: Path) -> tuple[Path, Path]:
    """The preset file and its plot."""
    target = output if output.suffix == ".json" else output.with_name(output.name + ".json")
    return target, target.with_suffix(".png")


def source_of(
    options: arguments.Options, calibration: "Calibration", guarantee: "Guarantee | None"
) -> str:
    """Where the value comes from, in the words of a preset."""
    from diffalign import __version__

    about = f"{options.count} prompts{'' if options.prompts_file else ' of GenEval'}"
    about += f", seeds from {options.seed}"
    about += f", {options.size} pixels" if options.size else ""
    about += f", negative prompt {options.negative_prompt!r}" if options.negative_prompt else ""
    promise = f"; {promise_of(guarantee)}" if guarantee else ""
    return (
        f"diffalign {__version__} calibrate, {date.today().isoformat()}, {options.model}: {about}; "
        f"{100 * (1 - calibration.nfe / calibration.nfe_cfg):.0f}% of the evaluations saved, mean "
        f"absolute pixel difference {float(calibration.difference.mean()):.4f}{promise}"
    )


def promise_of(guarantee: "Guarantee") -> str:
    """What is promised, in words."""
    return (
        f"mean loss ({guarantee.measure}) at most {guarantee.loss:g} at confidence "
        f"{guarantee.confidence:g}, tested on {guarantee.images} images"
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


def report(
    options: arguments.Options,
    calibration: "Calibration",
    source: str,
    guarantee: "Guarantee | None",
) -> None:
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
            "guarantee": None if guarantee is None else asdict(guarantee),
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
                    f"{latched} of {len(calibration.difference)}",
                    f"{apart:.4f}" if best else "",
                ]
            )
        heads = ["threshold", "NFE/image", "saved", "images that latch", "pixel difference"]
        show.text(
            f"{options.model}: plain guidance costs {full} NFE per image; * chosen, "
            f"{calibration.nfe:.1f} NFE measured"
        )
        show.table(heads, rows, numbers=heads)
        if guarantee is not None:
            show_trials(guarantee)
        show.text(
            f"{target}\n{picture}\n{use} makes --technique adaptive-guidance use it on this model"
        )


def show_trials(guarantee: "Guarantee") -> None:
    """The test of each candidate, in the order of the test."""
    heads = ["threshold", "saved", "mean loss", "p"]
    rows = [
        [f"{t.threshold:g}", f"{100 * t.saving:.0f}%", f"{t.loss:.4f}", f"{t.p:.2g}"]
        for t in guarantee.trials
    ]
    show.text(f"Certain: {promise_of(guarantee)}. The tests, until one failed:")
    show.table(heads, rows, numbers=heads)


@calibrate.command("policy")
@command
@arguments.shared(
    without=("prompt", "technique"),
    help={
        "count": "Images, half of them to check on. Prompts: --prompts-file, else GenEval's.",
        "output": "Policy to write (.json); trials are kept beside it until it is finished.",
    },
    batch=16,
    count=32,
    output=arguments.REQUIRED,
)
def policy(
    options: arguments.Options,
    nfe: Annotated[
        int,
        typer.Option(
            help="Evaluations of an image; plain guidance takes two a step.",
            rich_help_panel=arguments.HOW,
        ),
    ],
) -> None:
    """Search which steps are guided, and how strongly, for a number of evaluations, so that images
    stay near to plain guidance's. A search that was stopped goes on."""
    from diffalign.calibration.policy import check_policy, most_trials, search_policy
    from diffalign.cli.measurement import prepare_measurement, repeated
    from diffalign.cli.request import check_free
    from diffalign.guidance import CFG

    target, _ = files_of(options.output)
    check_free(target)
    request = prepare_measurement(options, CFG())
    model = request.model
    with checking():
        check_policy(nfe, model.steps, int(getattr(model.pipe.scheduler, "order", 1)))
    repeat = repeated(request, options)
    setting = f"{repeat} --seed {options.seed} {sorted(request.prompts)}"
    call: Keywords = dict(model.size)
    trials = Trials(target.with_suffix(".trials.json"), setting)
    steps = (most_trials(model.steps, nfe) + 1) * model.steps * -(-request.calls // 2)
    try:
        with show.progress(steps, options.quiet) as bar:
            result = search_policy(
                model.pipe,
                request.prompts,
                scale=model.scale,
                steps=model.steps,
                nfe=nfe,
                negative_prompt=options.negative_prompt or "",
                batch=request.batch,
                seed=options.seed,
                step=bar("trials"),
                known=trials,
                **call,
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{len(trials)} trials are kept; repeat to go on") from None
    tell_policy(options, result, target, repeat)
    trials.path.unlink(missing_ok=True)


def tell_policy(options: arguments.Options, result: "Policy", target: Path, repeat: str) -> None:
    """Write the policy, and say what it is and how to use it."""
    from diffalign.core.registry import TECHNIQUES, written

    text = written(TECHNIQUES, result.technique)
    use = f"diffalign generate {repeat} --technique {shlex.quote(text)}"
    data = {**asdict(result), "technique": text, "use": use}
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(target.name + ".part")
    draft.write_text(show.to_json(data) + "\n", encoding="utf-8")
    draft.replace(target)
    if options.json:
        show.text(show.to_json(data))
    elif not options.quiet:
        show.text(
            f"{result.nfe} NFE per image (plain guidance: {2 * len(result.shares)}); mean squared "
            f"difference of the latents to plain guidance {result.error:.4g} on images that the "
            f"search did not see, without guidance {result.unguided:.4g}"
        )
        heads = ["step", "share of the weight"]
        show.table(
            heads, [(i, f"{share:g}") for i, share in enumerate(result.shares)], numbers=heads
        )
        show.text(f"{target}\n{use}")


class Trials(dict[tuple[float, ...], float]):
    """Errors of policies, kept in a file as they come; those of another setting are dropped."""

    def __init__(self, path: Path, setting: str) -> None:
        super().__init__()
        self.path, self.setting = path, setting
        if path.exists():
            saved = json.loads(path.read_text(encoding="utf-8"))
            if saved["setting"] == setting:
                self.update({tuple(shares): error for shares, error in saved["trials"]})

    def __setitem__(self, shares: tuple[float, ...], error: float) -> None:
        super().__setitem__(shares, error)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(self.path.name + ".part")
        draft.write_text(json.dumps({"setting": self.setting, "trials": list(self.items())}))
        draft.replace(self.path)
