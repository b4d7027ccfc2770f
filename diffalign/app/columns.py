"""Columns: variants of one image on the same noise, with what each cost and how it was judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import torch
from PIL import Image

from diffalign.app.desk import Progress, Run
from diffalign.app.shelf import Open
from diffalign.core.technique import Technique
from diffalign.drawing.charts import Curve, line_chart
from diffalign.generate.models import Model
from diffalign.generate.samples import Sample, picture, samples
from diffalign.generate.seeds import jobs_of
from diffalign.generate.verdicts import verdicts
from diffalign.tasks.geneval.verdict import Verdict, parse_prompt

T = TypeVar("T")
HEADS = ["column", "NFE", "guided steps", "seconds", "verdict"]


@dataclass(frozen=True, slots=True)
class Variant:
    """One column that is to be drawn; no technique is the plain pipeline."""

    label: str
    techniques: tuple[Technique, ...]
    # with the arguments of its call
    model: Model


@dataclass(frozen=True, slots=True)
class Column:
    """One column that is drawn."""

    label: str
    sample: Sample
    # None where nobody can judge
    verdict: Verdict | None
    # steps that ran both branches
    guided: int

    @property
    def image(self) -> Image.Image:
        """The image as the pipeline made it."""
        return picture(self.sample.image)

    @property
    def caption(self) -> str:
        """Label and cost in one line."""
        mark = "" if self.verdict is None else " ✓" if self.verdict.correct else " ✗"
        return f"{self.label}: {self.sample.report.nfe:g} NFE{mark}"

    @property
    def cells(self) -> list[str]:
        """Its line in the table of costs."""
        report = self.sample.report
        judged = "-"
        if self.verdict is not None:
            judged = "right" if self.verdict.correct else self.verdict.reason or "wrong"
        guided = f"{self.guided} of {report.steps}"
        return [self.label, f"{report.nfe:g}", guided, f"{report.seconds:.2f}", judged]


def drawn(
    opened: Open, variants: Sequence[Variant], prompt: str, seed: int, run: Run[T]
) -> Iterator[Column]:
    """Draw the variants one after another; ``run`` is told the steps, and stops them."""
    count, total = 0, sum(variant.model.steps for variant in variants)
    for variant in variants:

        def step(label: str = variant.label) -> None:
            nonlocal count
            count += 1
            run.tell(Progress(count, total, label))
            run.check()

        run.check()
        model, jobs = variant.model, jobs_of([prompt], base=seed)
        ((sample,),) = samples(
            model.pipe,
            variant.techniques,
            jobs,
            batch=1,
            call=model.call,
            facts={**model.facts, "base_seed": seed},
            step=step,
        )
        guides = any(technique.seam == "denoiser" for technique in variant.techniques)
        plain = sample.report.steps if model.scale != 1.0 else 0
        guided = sample.report.guided_steps if guides else plain
        yield Column(variant.label, sample, verdict_of(opened, sample), guided)


def verdict_of(opened: Open, sample: Sample) -> Verdict | None:
    """The judge's verdict; None without a judge, and for a prompt outside GenEval's grammar."""
    record = parse_prompt(sample.job.prompt)
    if opened.judge is None or record is None:
        return None
    (verdict,) = verdicts(opened.judge, torch.stack([sample.image]), [record])
    return verdict


def pairs(columns: Sequence[Column]) -> list[tuple[Image.Image, str]]:
    """Images with captions, as a gallery takes them."""
    return [(column.image, column.caption) for column in columns]


def slider(images: Sequence[Image.Image], index: int = -1) -> tuple[Image.Image, Image.Image]:
    """The first image beside another one, large enough for people to see pixels."""
    return enlarged(images[0]), enlarged(images[index])


def enlarged(image: Image.Image, side: int = 512) -> Image.Image:
    """A small image by a whole factor, so that it is shown as it is."""
    factor = max(1, side // max(image.size))
    size = (image.width * factor, image.height * factor)
    return image.resize(size, Image.Resampling.NEAREST)


def curves(columns: Sequence[Column]) -> Image.Image | None:
    """Effective scale and cosine of the branches by step; None where no step had both branches."""
    lines = []
    for column in columns:
        report = column.sample.report
        for name, values, right in (
            ("scale", report.scale, False),
            ("cosine", report.cosine, True),
        ):
            points = [(float(i), v) for i, v in enumerate(values) if v is not None]
            lines.append(Curve(f"{column.label}: {name}", points, right=right))
    if not any(chain.from_iterable(line.points for line in lines)):
        return None
    return line_chart(
        lines,
        title="Effective scale, and agreement of the branches, by step",
        x_label="step",
        y_label="effective scale",
        right_label="cosine of the branches",
        size=(900, 420),
    )


def reports(columns: Sequence[Column]) -> str:
    """What each column did, in full."""
    return "\n\n".join(f"{column.label}\n{column.sample.report}" for column in columns)
