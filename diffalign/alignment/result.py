"""What a run found: the image, how it came about, what it cost, and all of it in a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffalign.alignment.progress import Moment
from diffalign.core.errors import warn_once
from diffalign.core.search import Candidate, Lineage, Tree
from diffalign.core.types import Json
from diffalign.drawing.png import save_png
from diffalign.drawing.video import NEEDS_PYAV, RATE, has_pyav, save_gif, save_mp4

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, slots=True)
class Ledger:
    """What a run cost, its final call included."""

    # denoiser rows
    nfe: int = 0
    # images times evaluations: a pair of branches counts once, as most papers count
    evaluations: int = 0
    # calls of the denoiser
    calls: int = 0
    decodes: int = 0
    rewards: int = 0
    # backward passes, in rows
    backward: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Story:
    """What happened in a run."""

    # one entry for each time that the best image changed
    history: list[Moment]
    # numbers of the method's steps
    log: list[dict[str, float]]
    # why the run ended
    end: str
    # finished images, and how many of them share the highest score
    scored: int
    equal: int


def picture(image: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] as a Pillow image of 8 bits, as diffusers rounds it."""
    from PIL import Image

    pixels = (image.permute(1, 2, 0).float() * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.cpu().numpy())


@dataclass(slots=True)
class Result:
    """The best image of a run.

    ``image`` is that of a final plain call; ``replay()`` repeats it bit for bit.
    """

    prompt: str
    # [3, H, W] in [0, 1], of a video [T, 3, H, W]; float32 on the CPU
    tensor: Tensor
    # of the final call, by the reward that was optimised
    score: float
    lineage: Lineage
    ledger: Ledger
    story: Story
    # the best candidates, best first, and the first image of the run
    top: list[Candidate]
    first: Candidate
    # reward -> (score of the first image, score of the result), of rewards that were not optimised
    judges: dict[str, tuple[float, float]]
    settings: Json
    tree: Tree | None = None
    # what the method found besides images, such as a law of start noise
    findings: Mapping[str, Tensor] = field(default_factory=dict)
    repeat: Callable[[], Tensor] | None = field(default=None, repr=False)

    @property
    def history(self) -> list[Moment]:
        """One entry for each time that the best image changed."""
        return self.story.history

    @property
    def log(self) -> list[dict[str, float]]:
        """Numbers of the method's steps."""
        return self.story.log

    @property
    def end(self) -> str:
        """Why the run ended: finished, budget, interrupted or idle."""
        return self.story.end

    @property
    def scored(self) -> int:
        """Finished images."""
        return self.story.scored

    @property
    def equal(self) -> int:
        """Finished images that share the highest score."""
        return self.story.equal

    @property
    def image(self) -> Image.Image:
        """The image as Pillow has it; of a video the first frame."""
        return picture(self.tensor if self.tensor.ndim == 3 else self.tensor[0])

    @property
    def frames(self) -> list[Image.Image]:
        """The frames of a video, or the one image."""
        return [picture(f) for f in (self.tensor if self.tensor.ndim == 4 else self.tensor[None])]

    @property
    def seed(self) -> int | None:
        """The seed that alone makes the image in a plain call, None where there is none."""
        return self.lineage.seed

    @property
    def noise(self) -> Tensor | None:
        """The start noise [...] where the method found one, for ``latents=``."""
        return self.lineage.noise

    def replay(self) -> Image.Image:
        """The image again, by the same calls of the pipeline; equal bit for bit."""
        if self.repeat is None:
            raise RuntimeError("This result has no pipeline; only the one that align returned has.")
        tensor = self.repeat()[0].float().cpu()
        return picture(tensor if tensor.ndim == 3 else tensor[0])

    def to_dict(self) -> Json:
        """Everything but images as JSON data."""
        return data_of(self)

    def __str__(self) -> str:
        return text_of(self)

    def save(self, folder: str | os.PathLike[str], rate: float = RATE) -> list[Path]:
        """Write image, settings, curve and sheets; the paths of what was written.

        ``image.png`` carries the settings, ``result.json`` all numbers, ``curve.png`` the best
        score against NFE, ``before_after.png`` the first image beside the result, ``best.png`` the
        best candidates; ``tree.png`` and ``tree.svg`` of a tree, ``noise.pt`` of a found noise,
        ``drifts.pt`` of steps that a gradient led elsewhere (evaluation -> tensor), ``findings.pt``
        of other tensors that the method found. Of a video also ``video.gif``,
        ``frames.png`` and, where PyAV is installed, ``video.mp4``, at ``rate`` frames a second;
        ``image.png`` is then its first frame.
        """
        return write(self, Path(folder), rate)


def data_of(result: Result) -> Json:
    """A result without images as JSON data."""
    return {
        **result.settings,
        "score": result.score,
        "first_score": result.first.score,
        "judges": {name: list(pair) for name, pair in result.judges.items()},
        "seed": result.seed,
        "moves": [asdict(move) for move in result.lineage.moves],
        "own_noise": result.noise is not None,
        "drifts": [step for step, _ in result.lineage.drifts],
        "found_prompt": result.lineage.prompt,
        "ledger": asdict(result.ledger),
        **asdict(result.story),
    }


def text_of(result: Result) -> str:
    """A result in a few lines."""
    cost = result.ledger
    lines = [
        f"{result.score:.4f} (first image {result.first.score:.4f}) after {result.scored} images, "
        f"{cost.nfe} NFE, {cost.seconds:.1f} s; {result.end}"
    ]
    for name, (before, after) in result.judges.items():
        lines.append(f"{name}: {before:.4f} -> {after:.4f} (not optimised)")
    if result.equal > 1:
        lines.append(f"{result.equal} of {result.scored} images share the highest score")
    if result.lineage.prompt is not None:
        lines.append(f"prompt: {result.lineage.prompt}")
    return "\n".join(lines)


def write_video(frames: list[Image.Image], place: Path, rate: float) -> list[Path]:
    """Write ``video.gif``, and ``video.mp4`` where PyAV is there, else one warning."""
    save_gif(frames, place / "video.gif", rate)
    if not has_pyav():
        warn_once(f"video.mp4 was not written: {NEEDS_PYAV}.")
        return [place / "video.gif"]
    save_mp4(frames, place / "video.mp4", rate)
    return [place / "video.gif", place / "video.mp4"]


def write(result: Result, place: Path, rate: float = RATE) -> list[Path]:
    """Write a result into a folder; the paths of its files."""
    from diffalign.alignment.pictures import before_after, best_images, curve, frame_sheet
    from diffalign.drawing.tree import save_tree

    place.mkdir(parents=True, exist_ok=True)
    settings = {**result.settings, "seed": result.seed, "score": result.score}
    pictures: Mapping[str, Any] = {
        "image.png": result.image,
        "before_after.png": before_after(result),
        "best.png": best_images(result),
        "curve.png": curve(result),
    }
    if result.tensor.ndim == 4:
        pictures = {**pictures, "frames.png": frame_sheet(result)}
    for name, image in pictures.items():
        save_png(image, place / name, settings)
    (place / "result.json").write_text(json.dumps(data_of(result), indent=2, default=str))
    files = [place / name for name in (*pictures, "result.json")]
    if result.tensor.ndim == 4:
        files += write_video(result.frames, place, rate)
    if result.tree is not None and result.tree.images:
        files += save_tree(result.tree, place, result.prompt)
    if result.noise is not None:
        torch.save(result.noise, place / "noise.pt")
        files.append(place / "noise.pt")
    if result.lineage.drifts:
        torch.save(dict(result.lineage.drifts), place / "drifts.pt")
        files.append(place / "drifts.pt")
    if result.findings:
        torch.save(dict(result.findings), place / "findings.pt")
        files.append(place / "findings.pt")
    return files
