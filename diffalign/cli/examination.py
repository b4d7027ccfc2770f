"""A model examined on this machine: switched off it is the plain pipeline bit for bit, and every
technique runs, costs what it says and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

import torch
from torch import Tensor
from torch.nn import Module

from diffalign.cli.problem import one_line
from diffalign.core import Context, Guidance, Technique, UnsupportedModel
from diffalign.core.memory import Peak
from diffalign.core.option import REQUIRED, options_of
from diffalign.core.registry import TECHNIQUES, techniques, to_config
from diffalign.core.types import Json, StepInfo
from diffalign.families import family_of
from diffalign.generate.models import Model
from diffalign.generate.samples import samples
from diffalign.generate.seeds import Job
from diffalign.kernels.agreement import agreements
from diffalign.seams import Report, supports
from diffalign.seams.denoiser.rows import count_rows
from diffalign.seams.plan import bind, context_of
from diffalign.seams.support import reason_against

PROMPT, NEGATIVE = "a photo of a red apple and a green clock", "a photo of a dog"
RUNS = 2.6
"""Plain runs that a technique takes as long as, with the plain one after it."""


@dataclass(frozen=True, slots=True)
class Run:
    """One generation, not decoded."""

    # [C, H, W] or as the model packs them, float32 on the CPU
    latents: Tensor
    report: Report
    # rows that entered the denoisers, counted there
    rows: int
    seconds: float
    # None where it cannot be read
    peak_bytes: int | None


@dataclass(slots=True)
class Finding:
    """What is known of one thing that was examined."""

    name: str
    # "ok", "failed", "refused" by the library, "skipped" here
    result: str
    # why it is not "ok", or what is worth knowing
    remark: str = ""
    # evaluations per image in the report, and those that the technique declares where they follow
    # from its options alone
    nfe: float | None = None
    declared: float | None = None
    # of this run, and of the plain ones before and after it
    seconds: float | None = None
    plain_seconds: float | None = None
    peak_bytes: int | None = None
    # the techniques and their options as configurations hold them
    options: list[Json] = field(default_factory=list)


class Examination:
    """All runs of one model; ``findings`` grow while it runs."""

    def __init__(
        self,
        model: Model,
        seconds: float,
        steps: int | None,
        further: Sequence[tuple[str, tuple[Technique, ...]]] = (),
    ) -> None:
        """``seconds``: begin nothing new after them; ``steps``: None for as many as fit;
        ``further``: names and techniques that are tried besides."""
        self.model, self.budget, self.steps, self.further = model, seconds, steps, further
        self.began = perf_counter()
        self.findings: list[Finding] = []
        self.family = family_of(type(model.pipe))
        self.table = supports(model.pipe)
        self.call = {**model.call, "output_type": "latent"}
        # the plain run that came last
        self.plain: Run | None = None
        # whether the pipeline repeats itself, without which no bit can be compared
        self.repeats = True

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - (perf_counter() - self.began)

    @property
    def count(self) -> int:
        """How many names ``examine`` yields."""
        return 2 + len(self.table) + len(self.further)

    def _fitting(self) -> int:
        """As many steps as let every technique run in the time that is left: at least four, at
        most the model's own."""
        self.call["num_inference_steps"] = 2
        self.run()  # the first call of a process pays for what others do not
        each = self.run().seconds / 2
        runs = RUNS * (1 + sum(support.works for support in self.table) + len(self.further))
        return min(self.model.steps, max(4, int(self.left / (runs * each))))

    def run(self, *group: Technique) -> Run:
        """One image from the same noise."""
        job = Job(PROMPT, 0, "check")
        denoisers: list[Module] = list(self.family.present(self.model.pipe).values())
        with counted(denoisers) as rows, Peak(self.model.pipe.device) as peak:
            began = perf_counter()
            # what comes back lies on the CPU, so the device is done
            (sample,) = next(samples(self.model.pipe, group, [job], batch=1, call=self.call))
            seconds = perf_counter() - began
        return Run(sample.image, sample.report, sum(rows), seconds, peak.bytes)

    def examine(self) -> Iterator[str]:
        """Do everything; yields the name of what comes next."""
        yield "the plain pipeline"
        self.findings.append(self._again())
        yield "kernels"
        self.findings += kernels_on(self.model.pipe.device, self.model.pipe.dtype)
        for support in self.table if self.plain is not None else ():
            yield support.name
            self.findings.append(self._technique(support.name, support.reason))
        for text, group in self.further if self.plain is not None else ():
            yield text
            self.findings.append(self._tried(Finding(text, "skipped"), partial(tuple, group)))

    def _again(self) -> Finding:
        """Whether the plain pipeline runs, and makes the same bits twice."""
        try:
            self.steps = self.steps or self._fitting()
            self.call["num_inference_steps"] = self.steps
            before = self.run()
            self.plain = plain = self.run()
        except Exception as error:  # without it there is nothing to examine
            return Finding("off", "failed", f"the plain pipeline: {complaint(error)}")
        self.repeats = torch.equal(before.latents, plain.latents)
        finding = Finding("off", "ok", "the plain pipeline twice, bit for bit")
        finding.seconds, finding.peak_bytes, finding.nfe = (
            plain.seconds,
            plain.peak_bytes,
            plain.rows,
        )
        if not bool(plain.latents.isfinite().all()):
            finding.result, finding.remark = "failed", "the plain pipeline makes NaN or infinity"
        elif not self.repeats:
            finding.result = "skipped"
            finding.remark = "the plain pipeline does not repeat itself here: no bits are compared"
        return finding

    def _technique(self, name: str, reason: str) -> Finding:
        """One technique, and the plain pipeline after it."""
        cls, finding = techniques()[name], Finding(name, "skipped")
        required = [option for option, spec in options_of(cls).items() if spec.default is REQUIRED]
        if reason:
            finding.result, finding.remark = "refused", reason
        elif required:
            finding.remark = f"it needs {', '.join(required)}, which has no default"
        else:
            options = options_for(name, cls, self.steps or 0)
            self._tried(finding, lambda: (TECHNIQUES.build(name, options),))
        return finding

    def _tried(self, finding: Finding, make: Callable[[], tuple[Technique, ...]]) -> Finding:
        """Run techniques, then the plain pipeline again, and say what went wrong."""
        if self.left <= 0:
            finding.remark = f"the {self.budget:g} s were over"
            return finding
        before, run, wrong = self.plain, None, []
        try:
            group = make()
            finding.options = [to_config(technique) for technique in group]
            for technique in group:
                if reason := reason_against(technique, self._context()):
                    raise UnsupportedModel(reason)
            run = self.run(*group)
            finding.declared = declared(group, run.report, self._context())
        except UnsupportedModel as error:
            finding.result, finding.remark = "refused", one_line(error)
        except Exception as error:  # whatever it is, the others are examined too
            wrong.append(complaint(error))
        try:
            self.plain = after = self.run()
            if self.repeats and before and not torch.equal(before.latents, after.latents):
                wrong.append("afterwards the pipeline makes another image")
        except Exception as error:
            wrong.append(f"afterwards the plain pipeline fails: {complaint(error)}")
        if run is not None and self.plain is not None and before is not None:
            finding.result = "ok"
            finding.nfe, finding.seconds = run.report.nfe, run.seconds
            finding.peak_bytes = run.peak_bytes
            finding.plain_seconds = (before.seconds + self.plain.seconds) / 2
            # a family that mixes x0 cannot hand a prediction back to the bit
            eps = torch.finfo(self.model.pipe.dtype).eps if self.family.affine else 0.0
            wrong += faults(finding, run, before, self.repeats, 25 * eps)
            same = torch.equal(run.latents, before.latents)
            notes = ["the plain image, bit for bit"] if same else []
            finding.remark = "; ".join([*notes, *run.report.notes])
        if wrong:
            finding.result, finding.remark = "failed", "; ".join(wrong)
        return finding

    def _context(self) -> Context:
        """What a technique sees of the pipeline and of the call."""
        pipe = self.model.pipe
        arguments = bind(type(pipe), pipe, (), self.call)
        return context_of(pipe, self.family, call=arguments)


def kernels_on(device: torch.device, dtype: torch.dtype) -> list[Finding]:
    """The kernels that run there beside their plain forms in float64."""
    try:
        found = agreements(device, dtype)
    except Exception as error:  # a kernel that does not run must not hide the techniques
        return [Finding("kernels", "failed", complaint(error))]
    return [
        Finding(
            f"kernel {a.kernel}",
            "ok" if a.agrees else "failed",
            f"{a.choice}; error {a.error:.1e}, bound {a.bound:.1e}",
        )
        for a in found
    ]


def options_for(name: str, cls: type[Technique], steps: int) -> Mapping[str, object]:
    """Options with which a technique acts in a run of so few steps."""
    options: dict[str, object] = {}
    if "negative_prompt" in options_of(cls):
        options["negative_prompt"] = NEGATIVE
    if name == "cat":
        options["start"] = max(2, min(8, steps // 2))
    return options


def complaint(error: Exception) -> str:
    """An error in one line."""
    return one_line(f"{type(error).__name__}: {error}")


def faults(
    finding: Finding, run: Run, plain: Run, repeats: bool, rounding: float = 0.0
) -> list[str]:
    """What must not be, of a run that ended, beside a plain one that ``repeats`` itself or not.

    ``rounding``: how far plain guidance may be from the pipeline's own, beside its largest value.
    """
    wrong = []
    if not bool(run.latents.isfinite().all()):
        wrong.append("NaN or infinity in the image")
    if run.rows != run.report.rows:
        wrong.append(f"{run.rows} rows entered the model and {run.report.rows} were counted")
    if finding.declared is not None and finding.declared != run.report.nfe:
        wrong.append(f"{run.report.nfe:g} evaluations, {finding.declared:g} are declared")
    far, largest = (x.abs().max() for x in (run.latents - plain.latents, plain.latents))
    if repeats and finding.name == "cfg" and not bool(far <= rounding * largest):
        wrong.append(f"not the pipeline's own guidance: {float(far / largest):.1e} away")
    return wrong


def declared(group: tuple[Technique, ...], report: Report, context: Context) -> float | None:
    """Evaluations per image by the guidance's own ``passes``.

    None where they depend on what it sees, where a solver evaluates some steps twice, or where
    other techniques add some.
    """
    technique = group[0]
    twice = report.nfe_cfg != 2 * report.steps
    if len(group) > 1 or not isinstance(technique, Guidance) or twice:
        return None
    resolved = technique.resolve(context)
    if resolved.init(1) is not None:
        return None
    steps = [StepInfo(i, report.steps, sigma) for i, sigma in enumerate(report.sigma)]
    passes = [resolved.passes(step, None) for step in steps]
    # a pipeline with two calls may need one row more where the conditional one is not asked for
    if not all(any(p.conditioned for p in each) for each in passes):
        return None
    return float(sum(map(len, passes)))


@contextmanager
def counted(modules: list[Module]) -> Iterator[list[int]]:
    """Rows of every call of the modules, counted by hooks of torch."""
    rows: list[int] = []

    def count(module: Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        names = ("hidden_states", "sample", "x")
        hidden = args[0] if args else next(kwargs[name] for name in names if name in kwargs)
        rows.append(count_rows(hidden))

    handles = [module.register_forward_pre_hook(count, with_kwargs=True) for module in modules]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()
