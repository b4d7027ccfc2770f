"""Checks of one cell of the matrix: a technique on a tiny pipeline that carries a neighbour."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from torch import Tensor

import diffalign as da
from diffalign.core import (
    Guidance,
    GuidanceMismatch,
    Meter,
    Pass,
    SessionError,
    Technique,
    UnsupportedModel,
)
from diffalign.core.types import Pipeline
from diffalign.families import family_of
from diffalign.seams.plan import plan
from diffalign.testing.beside import examples
from diffalign.testing.beside.base import (
    STEPS,
    Arguments,
    Neighbour,
    Part,
    chosen_rows,
    denoiser_of,
    nothing,
)
from diffalign.testing.beside.hand import alone, evaluations, tracked
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_pipeline

Outcome = Literal["right", "refused", "absent"]
OURS = (UnsupportedModel, SessionError, GuidanceMismatch)
ROUNDING = 64 * torch.finfo(torch.float32).eps
"""Other shapes of the same products round differently, by some last places per layer and step."""


@dataclass(frozen=True, slots=True)
class Place:
    """A module as it was: what a technique may not leave changed."""

    cls: type
    attributes: Mapping[str, object]
    hooks: tuple[int, ...]


def footprint(pipe: Pipeline) -> dict[str, Place]:
    """Classes, attributes and hooks of every module of a pipeline, and of the pipeline itself."""
    places = {"": Place(type(pipe), {}, ())}
    places["scheduler"] = Place(type(pipe.scheduler), {}, ())
    for part, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            for name, module in component.named_modules():
                counts = (len(module._forward_hooks), len(module._forward_pre_hooks))
                places[f"{part}.{name}"] = Place(type(module), dict(vars(module)), counts)
    return places


def differences(before: Mapping[str, Place], after: Mapping[str, Place]) -> list[str]:
    """Names of modules that are no longer what they were."""
    changed = sorted(before.keys() ^ after.keys())
    for name in before.keys() & after.keys():
        old, new = before[name], after[name]
        same = old.attributes.keys() == new.attributes.keys() and all(
            new.attributes[key] is value for key, value in old.attributes.items()
        )
        if old.cls is not new.cls or old.hooks != new.hooks or not same:
            changed.append(name)
    return changed


@dataclass
class Setting:
    """A neighbour on a tiny pipeline, in place."""

    neighbour: Neighbour
    # class of the tiny pipeline
    name: str
    pipe: Pipeline
    # what the neighbour adds to a call
    arguments: Arguments
    folder: Path
    # the same on a pipeline of less, whose denoiser is AutoGuidance's weak one
    weak: Pipeline | None = None
    # results of the pipeline itself: branch -> [B, ...]
    plain: dict[str, Tensor] = field(default_factory=dict)

    def run(self, part: Part | None = None) -> Tensor:
        """The pipeline's result with whatever is active on it."""
        part = part or Part()
        inputs = {**self.neighbour.inputs(self.name, part), **self.arguments(part)}
        return final(self.pipe, inputs)

    def native(self, branch: Literal["both", "cond"] = "both") -> Tensor:
        """The result of the pipeline itself."""
        if branch not in self.plain:
            self.plain[branch] = self.run(Part(branch=branch))
        return self.plain[branch]

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of one image's prediction."""
        with tracked(self.pipe) as track:
            self.run()
        return tuple(track.predictions[0].shape[1:])

    def acting(self, name: str) -> Technique:
        """The technique of that name with an effect here."""
        if name == "auto-guidance":
            return examples.weakened(self.pipe, self.weak)
        shape = self.shape if name == "linear-ag" else ()
        return examples.acting(name, self.pipe, shape, STEPS, self.folder)


@contextmanager
def setting(
    neighbour: Neighbour, name: str, folder: Path, *, without: bool = False
) -> Iterator[Setting]:
    """The neighbour on a fresh tiny pipeline; ``without`` its mechanism, the same computed
    plainly."""
    pipe, weak = neighbour.pipeline(name), neighbour.pipeline(name)
    examples.weaken(getattr(weak, denoiser_of(weak)))
    put = neighbour.without if without else neighbour.put
    assert put is not None
    place: AbstractContextManager[Arguments] = put(pipe)
    with put(weak), place as arguments:
        yield Setting(neighbour, name, pipe, arguments, folder, weak)


@contextmanager
def beside(neighbour: Neighbour, name: str, folder: Path) -> Iterator[Cells]:
    """The checks of a neighbour on a class of tiny pipelines."""
    other = (
        setting(neighbour, name, folder, without=True) if neighbour.without else nullcontext(None)
    )
    with setting(neighbour, name, folder) as here, other as there:
        yield Cells(here, there)


class Cells:
    """Checks of techniques beside one neighbour on one pipeline."""

    def __init__(self, here: Setting, there: Setting | None) -> None:
        # with the neighbour, and without its mechanism
        self.here, self.there = here, there
        self.neighbour, self.pipe = here.neighbour, here.pipe
        self.native = here.native()
        before = footprint(self.pipe)
        self.here.run()
        self.before = footprint(self.pipe)
        # modules that a call changes by itself, as offloading does
        self.restless = set(differences(before, self.before))
        self.tolerance = ROUNDING * float(self.native.abs().max())

    def check(self, name: str) -> Outcome:
        """Every promise of one cell.

        "absent": the technique does not exist on this family, beside whatever.
        Raises: AssertionError where a promise is broken.
        """
        cls = examples.class_of(name)
        words = self.neighbour.refusal(name, cls, self.here.name)
        if is_absent(name, self.here.name, self.neighbour.variant, self.neighbour.text):
            return "absent"
        try:
            self._run(name, self.here.acting(name))
            sentence = ""
        except OURS as error:
            sentence = str(error)
        if sentence or words:
            assert words, f"{name} refuses without being listed: {sentence}"
            assert words in sentence, f"expected {words!r}; the sentence is: {sentence!r}"
            self._is_untouched()
            return "refused"
        self._off(name)
        self._is_untouched()
        return "right"

    def _run(self, name: str, technique: Technique) -> None:
        """The technique acts, and rightly."""
        session = da.apply(self.pipe, technique)
        with session, evaluations() as steps, tracked(self.pipe) as track:
            ours = self.here.run()
        assert ours.isfinite().all()
        report = session.report()
        assert not torch.equal(ours, self.native), f"{technique} had no effect: {report}"
        if isinstance(technique, Guidance) and self.neighbour.branches:
            assert len(steps) == len(track.latents)
            self._each_branch_alone(steps, track.latents)
        if self.there is not None:
            with da.apply(self.there.pipe, self.there.acting(name)):
                plain = self.there.run()
            bound = self.neighbour.bound
            rounding = self.tolerance * examples.REACH.get(name, 1.0)
            limit = rounding if bound is None else bound * float(plain.abs().max())
            assert _distance(ours, plain) <= limit, (
                f"{technique}: {_distance(ours, plain)} from the same without the mechanism"
            )
        if self.neighbour.images:
            self._each_image_alone(technique, ours)
        if self.neighbour.remembers:
            self._images_are_apart(technique)

    def _each_branch_alone(self, steps: list[dict[Pass, Tensor]], way: list[Tensor]) -> None:
        """Every prediction is that of the pipeline itself with that branch only."""
        results: dict[tuple[object, ...], list[Tensor]] = {}
        for index, preds in enumerate(steps):
            for p, value in preds.items():
                if not p.conditioned and self.here.name in self.neighbour.shared:
                    continue
                key = (p.name, p.blocks)
                if key not in results:
                    results[key] = self._alone(p, way)
                expected = results[key][index][chosen_rows(p.rows)]
                assert _distance(value, expected) <= ROUNDING * float(expected.abs().max()), (
                    f"pass {p} of step {index}: {_distance(value, expected)} from the branch alone"
                )

    def _alone(self, p: Pass, way: list[Tensor]) -> list[Tensor]:
        part = Part(branch="cond" if p.conditioned else "uncond", led=True)
        inputs = {**self.neighbour.inputs(self.here.name, part), **self.here.arguments(part)}
        return alone(self.pipe, p, inputs, way)

    def _each_image_alone(self, technique: Technique, ours: Tensor) -> None:
        # that rule guides whichever image comes first
        first_only = isinstance(technique, examples.FirstImage)
        for image in range(1 if first_only else len(ours)):
            with da.apply(self.pipe, technique):
                single = self.here.run(Part(images=(image,)))
            assert _distance(single, ours[[image]]) <= self.tolerance, (
                f"image {image} alone is another: {_distance(single, ours[[image]])}"
            )

    def _images_are_apart(self, technique: Technique) -> None:
        """Image 0 does not notice which prompt image 1 has."""
        results = []
        for shift in (0.0, 1.0):
            inputs = {**self.neighbour.inputs(self.here.name, Part())}
            for key in ("prompt_embeds", "negative_prompt_embeds"):
                inputs[key] = inputs[key].clone()
                inputs[key][1] += shift
            with da.apply(self.pipe, technique):
                results.append(final(self.pipe, {**inputs, **self.here.arguments(Part())}))
        assert _distance(results[0][0], results[1][0]) <= self.tolerance, "images are mixed up"
        assert not torch.equal(results[0][1], results[1][1])

    def _off(self, name: str) -> None:
        """Switched off, it is the pipeline itself, bit for bit."""
        if off := examples.neutral(name):
            technique, branch = off
            with da.apply(self.pipe, technique):
                assert torch.equal(self.here.run(), self.here.native(branch)), f"{name} is not off"
        if self.neighbour.remembers and (weak := examples.faint(name)):
            with da.apply(self.pipe, weak):
                distance = _distance(self.here.run(), self.native)
            # the effect of a weight of 1e-7, which later steps may enlarge a hundred times
            assert distance <= 1e-4 * float(self.native.abs().max()), f"{name}: {distance}"

    def _is_untouched(self) -> None:
        assert torch.equal(self.here.run(), self.native), "something was left behind"
        changed = set(differences(self.before, footprint(self.pipe))) - self.restless
        assert not changed, f"left changed: {sorted(changed)[:5]}"


@functools.cache
def is_absent(name: str, pipeline: str, variant: str = "", text: bool = False) -> bool:
    """Whether a technique cannot act on a class of pipelines, whatever else is on it."""
    pipe = _bare(pipeline, variant, text)
    neighbour = Neighbour(name="", group="", pipelines=(pipeline,), put=_no_one, text=text)
    with TemporaryDirectory() as folder:
        here = Setting(neighbour, pipeline, pipe, nothing, Path(folder))
        technique, inputs = here.acting(name), neighbour.inputs(pipeline, Part())
        try:
            plan(pipe, family_of(type(pipe)), (technique,), (), inputs, Meter())
        except UnsupportedModel:
            return True
    return False


@functools.cache
def _bare(pipeline: str, variant: str, text: bool) -> Pipeline:
    """A tiny pipeline to ask, never to change."""
    return tiny_pipeline(pipeline, variant=variant, text=text)


@contextmanager
def _no_one(pipe: Pipeline) -> Iterator[Arguments]:
    yield nothing


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
