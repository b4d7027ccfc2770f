"""What a run did and what it cost: numbers, text and a plot."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from diffalign.core.values import plain
from diffalign.drawing.charts import Curve, line_chart


@dataclass(slots=True)
class Report:
    """One generation. Lists have one entry per step.

    ``nfe``: denoiser rows per image; ``nfe_cfg``: what plain guidance at every step costs.
    ``rows``, ``calls``: denoiser rows and calls in all. ``decodes``, ``rewards``: images decoded
    and scored by the techniques. ``scale``: effective guidance scale ``<d - d_n, d_c - d_n> / |d_c
    - d_n|^2``, mean over images, None where only one branch ran; ``orthogonal``: the part of ``d -
    d_n`` that is not along ``d_c - d_n``, relative to it; ``cosine``: between the branches, as
    noise predictions. ``layers``: technique -> (layers acting, layers selected); ``acted``:
    technique -> number of steps in which. ``resolved``: technique -> option -> (value, source).
    """

    pipeline: str = ""
    images: int = 0
    steps: int = 0
    guided_steps: int = 0
    nfe: float = 0.0
    nfe_cfg: float = 0.0
    rows: int = 0
    calls: int = 0
    decodes: int = 0
    rewards: int = 0
    seconds: float = 0.0
    sigma: list[float] = field(default_factory=list)
    scale: list[float | None] = field(default_factory=list)
    orthogonal: list[float | None] = field(default_factory=list)
    cosine: list[float | None] = field(default_factory=list)
    layers: dict[str, tuple[int, int]] = field(default_factory=dict)
    acted: dict[str, int] = field(default_factory=dict)
    resolved: dict[str, dict[str, tuple[Any, str]]] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON data; infinity and "not a number" are texts."""
        data: dict[str, Any] = plain(asdict(self))
        return data

    def __str__(self) -> str:
        if not self.steps:
            return f"{self.pipeline}: no generation has finished yet."
        lines = [
            f"{self.pipeline}: guided {self.guided_steps} of {self.steps} steps, {self.nfe:g} NFE "
            f"per image (CFG: {self.nfe_cfg:g}), "
            f"{self.images} image{'s' if self.images != 1 else ''}, {self.seconds:.1f} s"
        ]
        if self.decodes or self.rewards:
            lines.append(f"{self.decodes} decoded and {self.rewards} scored while sampling")
        for name, (acting, selected) in self.layers.items():
            lines.append(
                f"{name}: at {acting} of {selected} layers in {self.acted.get(name, 0)} of "
                f"{self.steps} steps"
            )
        for name, options in self.resolved.items():
            said = ", ".join(
                f"{key}={value!r}" + (f" ({source})" if source else "")
                for key, (value, source) in options.items()
            )
            lines.append(f"{name}({said})")
        if any(value is not None for value in self.scale):
            lines.append("step  sigma     effective scale  cosine")
            for i, (sigma, scale, cosine) in enumerate(zip(self.sigma, self.scale, self.cosine)):
                shown = (
                    f"{scale:15.3f}  {cosine:.5f}"
                    if scale is not None and cosine is not None
                    else f"{'-':>15}  -"
                )
                lines.append(f"{i:4d}  {sigma:8.4f}  {shown}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def plot(self, path: str | Path | None = None) -> Image.Image:
        """Effective scale and cosine against the step, as a picture; saved as PNG when ``path`` is
        given."""
        if not any(value is not None for value in self.scale):
            raise ValueError("Nothing to plot: no step of this run evaluated both branches.")
        image = line_chart(
            [
                Curve(
                    "effective scale", [(i, v) for i, v in enumerate(self.scale) if v is not None]
                ),
                Curve(
                    "cosine of the branches",
                    [(i, v) for i, v in enumerate(self.cosine) if v is not None],
                    right=True,
                ),
            ],
            title=f"{self.pipeline}: {self.nfe:g} NFE per image (CFG: {self.nfe_cfg:g})",
            x_label="step",
            y_label="effective scale",
            right_label="cosine of the branches",
        )
        if path is not None:
            image.save(path)
        return image
