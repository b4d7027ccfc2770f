"""``diffalign align``: extra runs of the model for a better image of a prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffalign.cli import arguments, show
from diffalign.cli.problem import BadInput, checking, command
from diffalign.cli.request import prepare, techniques_of

if TYPE_CHECKING:
    from torch import Tensor

    from diffalign.alignment.driver import Status
    from diffalign.alignment.forecast import Forecast
    from diffalign.alignment.result import Result
    from diffalign.core.budget import Budget
    from diffalign.core.search import Candidate
    from diffalign.core.technique import Technique
    from diffalign.core.types import Json, Keywords, Pipeline
    from diffalign.generate.models import Model

PANEL = "How to search"


def _option(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=PANEL)


Method = Annotated[str, _option("name:key=value,...; see diffalign methods.")]
Reward = Annotated[
    str | None,
    _option("The score to raise, several as 2*clip+flicker; an embedded model's own if left out."),
]
Limits = Annotated[
    str | None, _option("nfe=400,seconds=20,...: any of nfe, seconds, rewards, decodes, backward.")
]
Judges = Annotated[list[str] | None, _option("A further score to report, never optimised.")]
Ties = Annotated[list[str] | None, _option("A score that settles equal ones.")]
Kernel = Annotated[
    str | None,
    _option(
        "Random steps for methods that branch: eta, flow-sde, vp-flow. The scheduler's own if left "
        "out, and eta where that draws no noise."
    ),
]
Resume = Annotated[bool, _option("Continue the run in --output.", "--resume")]
Clip = Annotated[
    Path | None,
    _option("A video, or GIF, to go on from: tree-of-frames, linear-search.", "--continue"),
]
Frames = Annotated[int | None, _option("Frames of a video; the model's own number if left out.")]
Chunks = Annotated[
    int | None, _option("Chunks of a video that is made chunk by chunk; the model's if left out.")
]
Rate = Annotated[float, _option("Frames a second of the video files.", "--fps")]


@command
@arguments.shared(output=Path("outputs/align"), without=("count", "prompts_file"))
def align(
    options: arguments.Options,
    text: Annotated[str | None, typer.Argument(metavar="PROMPT", help="The prompt.")] = None,
    method: Method = "best-of-n",
    reward: Reward = None,
    budget: Limits = None,
    judge: Judges = None,
    tie: Ties = None,
    kernel: Kernel = None,
    resume: Resume = False,
    clip: Clip = None,
    frames: Frames = None,
    chunks: Chunks = None,
    fps: Rate = 8.0,
) -> None:
    """Search for a better image, or video, of a prompt; Ctrl-C keeps the best so far."""
    if text is not None:
        options = dataclasses.replace(options, prompt=[text, *(options.prompt or [])])
    techniques = techniques_of(options.technique)
    limits = read_budget(budget)
    reward = reward or usual_reward(options.model)
    check_folder(options.output, resume)
    start = None if clip is None else read_clip(clip)
    from diffalign.alignment.door import align as search

    request = prepare(options, techniques, media="videos" if clip is None else "continued videos")
    extra = video_call(request.model, {"num_frames": frames, "chunks": chunks}, fps)
    if start is not None and not request.model.size:
        extra |= {"height": start.shape[2], "width": start.shape[3]}
    prompts = list(request.prompts)
    call = {**request.model.call, **extra, "clip": start}
    quiet = options.quiet or options.json
    with checking(), resumable(options.output), live(quiet) as line:
        chosen = kernel or needed_kernel(request.model.pipe, prompts[0], method, techniques, call)
        picture = LivePicture(options.output)
        notes = [f"Best image so far: {picture.path}"]
        if chosen != kernel:
            name = method.partition(":")[0]
            notes.append(f"Kernel: {chosen}, since {name} needs a sampler that draws noise")
        results = search(
            request.model.pipe,
            prompts if len(prompts) > 1 else prompts[0],
            method=method,
            reward=reward,
            budget=limits,
            techniques=techniques,
            judges=judge or (),
            ties=tie or (),
            kernel=chosen,
            batch=options.batch,
            seed=options.seed,
            folder=options.output,
            show=line,
            improved=picture,
            announce=None if quiet else partial(announce, notes),
            **call,
        )
    if len(prompts) > 1:
        picture.remove()
    say(options, prompts, results, fps)


def usual_reward(model: str) -> str:
    """The reward of a search that names none. Raises: ``BadInput`` for a model without one."""
    from diffalign.embedded.load import reward_of

    if own := reward_of(model):
        return own
    raise BadInput(
        f"--reward is needed for {model}: the score to raise, such as clip, pick-score or "
        "hps-v2-1; see diffalign rewards. Only embedded models have one of their own."
    )


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Inside, Ctrl-C that leaves no result says how to go on, where there is something to go on
    from."""
    try:
        yield
    except KeyboardInterrupt:
        if not any(folder.rglob("state.pt")):
            raise
        raise KeyboardInterrupt("no result yet; the same command with --resume goes on") from None


def read_clip(path: Path) -> Tensor:
    """Frames [F, 3, H, W] in [0, 1] of a video file. Raises: ``BadInput`` for what is none."""
    import numpy as np
    import torch

    from diffalign.drawing.video import read_frames

    try:
        frames = read_frames(path)
    except (ValueError, ImportError) as error:
        raise BadInput(f"--continue: {error}.") from error
    return torch.from_numpy(np.stack([np.asarray(f) for f in frames])).permute(0, 3, 1, 2) / 255


def video_call(model: Model, numbers: Mapping[str, int | None], fps: float) -> dict[str, int]:
    """Arguments of a video's length.

    Raises: ``BadInput`` for a model of images, for numbers below 1, and without PyAV.
    """
    from diffalign.drawing.video import NEEDS_PYAV, has_pyav

    known = {name: number for name, number in numbers.items() if number is not None}
    options = {"num_frames": "--frames", "chunks": "--chunks"}
    for name, number in known.items():
        if not model.videos:
            raise BadInput(f"{options[name]}: {model.name} makes images, not videos.")
        if number < 1:
            raise BadInput(f"{options[name]} must be at least 1; got {number}.")
    if model.videos and not 0 < fps <= 240:
        raise BadInput(f"--fps must be in (0, 240]; got {fps:g}.")
    if model.videos and not has_pyav():
        raise BadInput(f"a video is written as MP4, and {NEEDS_PYAV}.")
    return known


def needed_kernel(
    pipe: Pipeline, prompt: str, method: str, techniques: Sequence[Technique], call: Keywords
) -> str | None:
    """The kernel of a method that branches, where the scheduler alone draws no noise."""
    from diffalign.alignment.order import method_of, usual_kernel
    from diffalign.alignment.setting import Setting

    arguments = {name: value for name, value in call.items() if name != "clip"}
    setting = Setting(pipe, prompt, tuple(techniques), arguments, clip=call["clip"])
    return usual_kernel(setting, method_of(method))


@dataclasses.dataclass(frozen=True, slots=True)
class LivePicture:
    """The best image so far as a file, whole at any time; of a video the first frame."""

    folder: Path

    @property
    def path(self) -> Path:
        """Where it is: one file for all prompts, since they run one after the other."""
        return self.folder / "image.png"

    def __call__(self, candidate: Candidate) -> None:
        """Write a better image."""
        from diffalign.alignment.result import picture
        from diffalign.drawing.png import save_png

        self.folder.mkdir(parents=True, exist_ok=True)
        image = candidate.image if candidate.image.ndim == 3 else candidate.image[0]
        save_png(picture(image), self.path, {"score": candidate.score})

    def remove(self) -> None:
        """Leave the images of several prompts to their folders."""
        self.path.unlink(missing_ok=True)


def announce(notes: Sequence[str], forecast: Forecast) -> None:
    """Say on standard error what the run will take, and notes on it."""
    for line in (str(forecast), *notes):
        typer.echo(line, err=True)


def check_folder(place: Path, resume: bool) -> None:
    """Raise ``BadInput`` for a run that nobody asked to continue, and for none to continue."""
    started = (place / "run.json").exists() or any(place.glob("*/run.json"))
    if started and not resume:
        raise BadInput(
            f"--output {str(place)!r} holds a run; continue it with --resume, or give another "
            "folder."
        )
    if resume and not started:
        raise BadInput(f"--resume: there is no run in {str(place)!r}.")


def say(
    options: arguments.Options,
    prompts: Sequence[str],
    results: Result | list[Result],
    fps: float,
) -> None:
    """Save the results and print what they are."""
    from diffalign.alignment.door import folders_of

    several = isinstance(results, list)
    folders = folders_of(options.output, prompts) if several else [options.output]
    entries: list[Json] = []
    for result, folder in zip(results if isinstance(results, list) else [results], folders):
        files = [str(file) for file in result.save(folder or options.output, fps)]
        entries.append({**result.to_dict(), "files": files})
        if not options.json and not options.quiet:
            show.text(result)
            show.text("\n".join(files))
    if options.json:
        show.text(show.to_json(entries if several else entries[0]))


def read_budget(text: str | None) -> Budget | None:
    """``"nfe=400,seconds=20"`` -> a budget; None for none. Raises: ``BadInput``."""
    from diffalign.core.budget import read_budget as read

    try:
        return None if text is None else read(text)
    except ValueError as error:
        raise BadInput(f"--budget: {error}") from error


@contextmanager
def live(quiet: bool) -> Iterator[Callable[[Status], None] | None]:
    """A line on standard error with the best score so far, on a terminal only."""
    from rich.console import Console

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    with console.status("starting") as status:

        def line(now: Status) -> None:
            best = "none yet" if now.best is None else f"{now.best:.4f}"
            status.update(f"best {best}  {now.nfe} NFE  {now.seconds:.0f} s  {now.info.text}")

        yield line
