"""The options that commands share: what they mean, and what may be in them. Nothing here knows a
pipeline."""

from __future__ import annotations

import math
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from diffalign.cli.problem import BadInput

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class Options:
    """The options that commands share, as the user gave them."""

    model: str = "emoji"
    prompts: tuple[str, ...] = ()
    prompts_file: Path | None = None
    negative_prompt: str | None = None
    steps: int | None = None
    scale: float | None = None
    seed: int = 0
    count: int = 1
    batch: int = 4
    size: str | None = None
    scheduler: str | None = None
    dtype: str | None = None
    device: str = "auto"
    output: Path = Path("outputs")


def read_prompts(options: Options) -> tuple[str, ...]:
    """The prompts of the command line, then those of the file, one a line."""
    prompts = list(options.prompts)
    if any(not prompt.strip() for prompt in prompts):
        raise BadInput("--prompt is empty; describe the image.")
    if options.prompts_file is not None:
        try:
            lines = options.prompts_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(
                f"--prompts-file {str(options.prompts_file)!r} cannot be read as a UTF-8 text: "
                f"{error}."
            ) from error
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise BadInput(
                f"--prompts-file {str(options.prompts_file)!r} holds no prompt; write one a line."
            )
        prompts += found
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


def read_numbers(options: Options) -> None:
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
    if not 0 <= options.seed <= 2**63 - 1 - options.count:
        raise BadInput(f"--seed must be an integer in [0, 2^63 - 1 - count]; got {options.seed}.")


def read_device(device: str, dtype: str | None) -> tuple[str, str]:
    """Device and torch dtype by name.

    "auto" is the first accelerator, else the CPU; the dtype is fp32 on a CPU and bf16 elsewhere.
    """
    import torch

    best = (
        "cuda"
        if torch.cuda.is_available()
        else "mps"
        if torch.backends.mps.is_available()
        else "cpu"
    )
    chosen = best if device == "auto" else device
    try:
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(
            f"--device {device!r} cannot be used here; {best!r} can. ({error})"
        ) from error
    short = dtype or ("fp32" if chosen == "cpu" else "bf16")
    if short not in DTYPES:
        raise BadInput(f"--dtype must be one of {', '.join(DTYPES)}; got {dtype!r}.")
    return chosen, DTYPES[short]


def writable(folder: Path) -> Path:
    """``folder``, made if it was missing."""
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"--output {str(folder)!r} is a file; give a folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadInput(
            f"--output {str(folder)!r} cannot be written: {error.strerror or error}."
        ) from error
    return folder


def free(*files: Path, folder: Path | None = None) -> None:
    """Raise ``BadInput`` where a folder has the name of a file that is to be written, or a file
    that of ``folder``."""
    places = [(file, "file", file.is_dir()) for file in files]
    places += [(folder, "folder", folder.is_file())] if folder else []
    for path, wanted, found in places:
        if found:
            other = "folder" if wanted == "file" else "file"
            raise BadInput(
                f"--output: {str(path)!r} is to be a {wanted}, and a {other} of that name is "
                "there. Give another --output."
            )
