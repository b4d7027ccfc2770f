"""A request: what the user asks for, checked, with the model that will serve it."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.cli.arguments import Options
from diffalign.cli.problem import BadInput, checking
from diffalign.core.technique import Technique
from diffalign.core.types import Json

if TYPE_CHECKING:
    from diffalign.generate.models import Media, Model
    from diffalign.generate.seeds import Job


@dataclass(frozen=True, slots=True)
class Request:
    """Everything is checked: the model is loaded, its techniques fit, ``output`` can be written."""

    model: Model
    prompts: tuple[str, ...]
    # the images of all prompts
    jobs: tuple[Job, ...]
    # images per call of the pipeline
    batch: int
    # calls of the pipeline for all images
    calls: int
    # folder, which may not be there yet
    output: Path
    # what saved images say of the run
    facts: Json


def prepare(options: Options, *variants: Sequence[Technique], media: Media = "images") -> Request:
    """Check everything, cheapest first, then load the model. ``variants``: groups of techniques.

    Raises ``BadInput`` with the first thing that cannot be used.
    """
    from diffalign.generate.seeds import jobs_of

    prompts = read_prompts(options)
    check_numbers(options)
    output = writable(options.output)
    model = model_of(options, *variants, media=media)
    jobs = tuple(jobs_of(prompts, count=options.count, base=options.seed))
    return Request(
        model=model,
        prompts=prompts,
        jobs=jobs,
        batch=options.batch,
        calls=-(-len(jobs) // options.batch),
        output=output,
        facts={**model.facts, "base_seed": options.seed},
    )


def model_of(options: Options, *variants: Sequence[Technique], media: Media = "images") -> Model:
    """The loaded model, checked for a run with these options and groups of techniques.

    Raises ``BadInput``.
    """
    from diffalign.generate.models import Setting, open_model

    setting = Setting(
        steps=options.steps,
        scale=options.scale,
        negative_prompt=options.negative_prompt,
        size=read_size(options.size),
        scheduler=options.scheduler,
        dtype=options.dtype,
        device=options.device,
    )
    with checking():
        return open_model(options.model, setting, variants, media)


def techniques_of(texts: Sequence[str] | None) -> tuple[Technique, ...]:
    """Techniques of repeated ``--technique`` options, all together."""
    from diffalign.core.registry import parse

    with checking():
        return tuple(technique for text in texts or [] for technique in parse(text))


def read_prompts(options: Options) -> tuple[str, ...]:
    """The prompts of the command line, then those of the file, one a line."""
    prompts = list(options.prompt or [])
    if any(not prompt.strip() for prompt in prompts):
        raise BadInput("--prompt is empty; describe the image.")
    if options.prompts_file is not None:
        name = str(options.prompts_file)
        try:
            lines = options.prompts_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(
                f"--prompts-file {name!r} cannot be read as a UTF-8 text: {error}."
            ) from error
        texts = [line.strip() for line in lines if line.strip()]
        if not texts:
            raise BadInput(f"--prompts-file {name!r} holds no prompt; write one a line.")
        prompts += texts
    if not prompts:
        raise BadInput("no prompt; give --prompt TEXT or --prompts-file FILE.")
    return tuple(prompts)


def read_size(text: str | None) -> tuple[int, int] | None:
    """``"512"`` or ``"768x512"`` (width x height) -> (height, width)."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:[x×](\d+))?", text.strip().lower())
    width, height = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if width < 1 or height < 1:
        raise BadInput(
            f"--size must be like 512 or 768x512 (width x height in pixels); got {text!r}."
        )
    return height, width


def check_numbers(options: Options) -> None:
    """Raise ``BadInput`` for a number that cannot be used."""
    for name in ("steps", "count", "batch"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise BadInput(f"--{name} must be at least 1; got {value}.")
    if options.scale is not None and not (math.isfinite(options.scale) and options.scale >= 1.0):
        raise BadInput(
            "--scale must be a finite number of at least 1, where 1 is no guidance; got "
            f"{options.scale}. Less: --technique cfg:scale=0.5"
        )
    if options.seed < 0:
        raise BadInput(f"--seed must be an integer of at least 0; got {options.seed}.")


def writable(folder: Path) -> Path:
    """``folder``, after a try to write where it is or will be; nothing is left there."""
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"--output {str(folder)!r} is a file; give a folder.")
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise BadInput(
            f"--output {str(folder)!r} cannot be written: {error.strerror or error}."
        ) from error
    return folder


def check_free(*files: Path, folder: Path | None = None) -> None:
    """Raise ``BadInput`` where a folder has the name of a file that is to be written, or a file
    that of ``folder``."""
    places = [(file, "file", "folder") for file in files if file.is_dir()]
    places += [(folder, "folder", "file")] if folder is not None and folder.is_file() else []
    for path, purpose, other in places:
        raise BadInput(
            f"--output: {str(path)!r} is to be a {purpose}, and a {other} of that name is there. "
            "Give another --output."
        )
