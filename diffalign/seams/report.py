"""What a run did and what it cost: numbers, text and a plot."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from diffalign.core.values import plain
from diffalign.drawing.charts import Curve, line_chart


@dataclass(slots=True)
class Cost:
    """What a generation cost."""

    # denoiser rows per image
    nfe: float = 0.0
    # what plain guidance at every step costs, per image
    nfe_cfg: float = 0.0
    # denoiser rows and calls in all
    rows: int = 0
    calls: int = 0
    # images decoded and scored by the techniques
    decodes: int = 0
    rewards: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Curves(Cost):
    """How each step was guided: lists with one entry per step, means over images.

    With the conditional prediction ``c``, the unconditional one ``u`` and the guided one ``g``.
    None where only one branch ran, or both agree.
    """

    # noise level
    sigma: list[float] = field(default_factory=list)
    # effective guidance scale <g - u, c - u> / |c - u|^2
    scale: list[float | None] = field(default_factory=list)
    # the part of g - u that is not along c - u, relative to it
    orthogonal: list[float | None] = field(default_factory=list)
    # cosine of c and u, in the space that the technique names
    cosine: list[float | None] = field(default_factory=list)


@dataclass(slots=True)
class Report(Curves):
    """One generation: what it did and what it cost."""

    # class name
    pipeline: str = ""
    images: int = 0
    steps: int = 0
    # steps that ran both branches
    guided_steps: int = 0
    # technique -> (layers acting, layers selected)
    layers: dict[str, tuple[int, int]] = field(default_factory=dict)
    # technique -> number of steps in which it acted
    acted: dict[str, int] = field(default_factory=dict)
    # attention backend -> layers at which it ran the dense calls of attention techniques
    backends: dict[str, int] = field(default_factory=dict)
    # technique -> option -> (value, where it came from)
    resolved: dict[str, dict[str, tuple[Any, str]]] = field(default_factory=dict)
    # denoiser -> what its technique says beyond the above
    extras: dict[str, Any] = field(default_factory=dict)
    # technique -> "steps" that left image tokens out, those "computed" of all "tokens" in each,
    # "operations" of the blocks beside "operations_of_all" tokens, largest "cache_bytes"
    pruning: dict[str, dict[str, float]] = field(default_factory=dict)
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
        for name, facts in self.pruning.items():
            share = facts["operations"] / facts["operations_of_all"]
            lines.append(
                f"{name}: {facts['computed']:g} of {facts['tokens']:g} image tokens in "
                f"{facts['steps']:g} of {self.steps} steps, {100 * share:.0f}% of the blocks' "
                f"{facts['operations_of_all'] / 1e12:.3g} TFLOP, caches "
                f"{facts['cache_bytes'] / 2**20:.1f} MiB"
            )
        if self.backends.keys() - {"native"}:
            ran = ", ".join(f"{name} at {count}" for name, count in self.backends.items())
            lines.append(f"attention backend of the techniques' layers: {ran}")
        for name, options in self.resolved.items():
            shown = ", ".join(
                f"{key}={value!r}" + (f" ({source})" if source else "")
                for key, (value, source) in options.items()
            )
            lines.append(f"{name}({shown})")
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
