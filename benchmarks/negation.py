"""NAG beside CFG's negative prompt: how often a negated object or colour is gone, at equal
effective strength. Part of attention.py.

Objects: GenEval's two-object prompts; the second object is named in the prompt and negated.
Colours: its single-object prompts; negated is the object in the colour that the judge sees when the
same noise is denoised without guidance, so "nothing" is 0 by construction.
"""

from __future__ import annotations

import inspect
import json
import math
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from results import UNITS, Estimate, Row, save
from rich.progress import Progress
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

import diffalign as da
from diffalign.core.identity import model_hash
from diffalign.drawing.sheet import Cell, contact_sheet
from diffalign.eval.evidence import seed_of
from diffalign.eval.statistics import interval
from diffalign.families import family_of
from diffalign.families.text import Encoder
from diffalign.generate.samples import Job, samples
from diffalign.tasks.geneval.verdict import keep, prompts

SAMPLES, BATCH = 2, 16
# CFG at this scale has its strength measured all the same, to check the measure
CHECKED = 3.0
COLUMNS = UNITS | {
    "effective strength": "1 is nothing negated, the scale is CFG with the negative prompt",
    "off the line": "part of the prediction that no scale gives",
    "gone": "share of images",
    "other kept": "share of images",
    "gone and kept": "share of images",
    "gone and kept, difference": "difference of share to CFG's negative prompt at equal strength",
}
Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Way:
    """One way to negate. ``cfg``: guidance scale, 1 is none; ``nag``: NAG's scale, 1 is none;
    ``negative``: CFG has the negative prompt.

    ``steps``: those of the model if None. ``always``: NAG acts at every step, not only in the
    window that its preset has for this family of models. ``adaptive``: with AdaptiveGuidance, at
    the threshold that the model is known to need.
    """

    cfg: float = 1.0
    nag: float = 1.0
    negative: bool = False
    steps: int | None = None
    always: bool = False
    # AdaptiveGuidance instead of plain guidance
    adaptive: bool = False

    @property
    def known(self) -> float | None:
        """Effective strength where it need not be measured: 1 for nothing, the scale for CFG with
        the negative prompt; AdaptiveGuidance has it as long as it guides."""
        plain = self.cfg == 1 or self.adaptive or (self.negative and self.cfg != CHECKED)
        return self.cfg if self.nag == 1 and plain else None

    @property
    def name(self) -> str:
        rule = "AG" if self.adaptive else "CFG"
        parts = [f"{rule} {self.cfg:g}"] if self.cfg != 1 else []
        parts += ["negative"] if self.negative else [f"NAG {self.nag:g}"] if self.nag != 1 else []
        parts += ["at every step"] if self.always else []
        return " ".join(parts or ["nothing"]) + (
            "" if self.steps is None else f", {self.steps} steps"
        )


@dataclass(frozen=True, slots=True)
class Case:
    """One image: its prompt and noise, the object to keep, what is negated, and the text that
    negates it."""

    prompt_id: int
    sample: int
    wanted: str
    negated: str
    text: str

    @property
    def place(self) -> tuple[int, int]:
        """Prompt and sample."""
        return self.prompt_id, self.sample

    def judged(self, seen: Sequence[Any], judge: Any) -> dict[str, bool]:
        tag = prompts()[self.prompt_id]["tag"]
        kept = keep(seen, tag, judge.thresholds)
        mine = kept.get(self.wanted, [])
        there = (
            bool(kept.get(self.negated))
            if tag == "two_object"
            else self.negated in {seen[i].colour for i in mine}
        )
        return {"gone": not there, "kept": bool(mine), "both": bool(mine) and not there}


def objects() -> list[Case]:
    """The 99 two-object prompts, twice each."""
    return [
        Case(n, k, wanted, negated, f"a photo of a {negated}")
        for n, item in enumerate(prompts())
        if item["tag"] == "two_object"
        for wanted, negated in [[clause["class"] for clause in item["include"]]]
        for k in range(SAMPLES)
    ]


def colours(pipe: Any, judge: Any, options: Namespace, bar: Progress) -> list[Case]:
    """The 80 single-object prompts, twice each, with the colour that the object has without
    guidance; images without it are left out."""
    blank = [
        Case(n, k, item["include"][0]["class"], "", "")
        for n, item in enumerate(prompts())
        if item["tag"] == "single_object"
        for k in range(SAMPLES)
    ]
    seen = {
        (r["prompt_id"], r["sample"]): r["colour"]
        for r in collect(pipe, judge, Way(), blank, "plain", options, bar)
    }
    return [
        Case(c.prompt_id, c.sample, c.wanted, colour, f"a photo of a {colour} {c.wanted}")
        for c in blank
        if (colour := seen[c.prompt_id, c.sample]) is not None
    ]


Call = tuple[dict[str, Any], Tensor]
"""One call of the denoiser: its arguments by name, and what it predicted."""


def effective(
    pipe: Any, calls: list[Call], scale: float, texts: list[str]
) -> tuple[Tensor, Tensor]:
    """Mean over steps of ``<d - d_n, d_c - d_n> / |d_c - d_n|^2`` and of the part off that line,
    per image.

    ``calls``: those of the denoiser, one a step. d is the guided prediction, d_c and d_n the plain
    ones with the prompt and with the negative text at the same state. Affine in the output, so
    outputs stand for denoised images.
    """
    denoiser, negative = denoiser_of(pipe), encoder_of(pipe)(pipe, texts)
    found = []
    for named, out in calls:
        guided, half = out, len(out) // 2 if scale != 1 else 0
        if scale != 1:
            guided = out[:half] + scale * (out[half:] - out[:half])
        prompt = {
            name: value[half:] if isinstance(value, Tensor) and value.ndim else value
            for name, value in named.items()
        }
        d_c, d_n = (
            denoiser(**(prompt | text) | {"return_dict": False})[0] for text in ({}, negative)
        )
        line, moved = ((d - d_n).flatten(1).double() for d in (d_c, guided))
        along = (moved * line).sum(1) / line.square().sum(1)
        found.append((along, (moved - along[:, None] * line).norm(dim=1) / line.norm(dim=1)))
    along, off = (torch.stack(values).mean(0) for values in zip(*found))
    return along, off


def denoiser_of(pipe: Any) -> Any:
    """The one denoiser of ``pipe``."""
    (denoiser,) = family_of(type(pipe)).present(pipe).values()
    return denoiser


def encoder_of(pipe: Any) -> Encoder:
    """How the texts of ``pipe`` become arguments of its denoiser.

    Raises: SystemExit for a family whose texts diffalign cannot encode.
    """
    encoder = family_of(type(pipe)).encoder
    if encoder is None:
        raise SystemExit(f"{type(pipe).__name__}: its texts cannot be encoded; take another model.")
    return encoder


@dataclass(slots=True)
class Calls:
    """Calls of the denoiser, while it is watched."""

    pipe: Any
    values: list[Call] = field(default_factory=list)
    _handle: Any = None

    def __enter__(self) -> Calls:
        self._handle = denoiser_of(self.pipe).register_forward_hook(self._log, with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def _log(self, module: Any, positional: Any, named: Any, output: Any) -> None:
        names = tuple(inspect.signature(type(module).forward).parameters)[1:]
        named = dict(zip(names, positional)) | named
        copied = {k: v.clone() if isinstance(v, Tensor) else v for k, v in named.items()}
        self.values.append((copied, output[0].clone()))


def read_lines(path: Path) -> list[Record]:
    """Records of a JSON lines file; a torn last line, left by an interruption, is dropped."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


@torch.no_grad()
def collect(
    pipe: Any, judge: Any, way: Way, cases: list[Case], kind: str, options: Namespace, bar: Progress
) -> list[Record]:
    """Records of all cases in their order; images lie beside them, and a run that was cut off goes
    on where it stopped."""
    model = model_hash(denoiser_of(pipe))
    folder = Path(options.runs_folder) / model / kind / way.name.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "records.jsonl"
    done: dict[tuple[int, int], Record] = {
        (r["prompt_id"], r["sample"]): r for r in read_lines(path)
    }
    task = bar.add_task(f"{kind}: {way.name}", total=len(cases), completed=len(done))
    missing = [case for case in cases if case.place not in done]
    for start in range(0, len(missing), BATCH):
        batch = missing[start : start + BATCH]
        records, images = recorded(pipe, judge, way, batch, options.steps)
        for case, image in zip(batch, images, strict=True):
            to_pil_image(image).save(folder / f"{case.prompt_id}-{case.sample}.png")
        with path.open("a") as lines:
            lines.writelines(json.dumps(record) + "\n" for record in records)
        done |= {case.place: record for case, record in zip(batch, records, strict=True)}
        bar.advance(task, len(batch))
    return [done[case.place] for case in cases]


def recorded(
    pipe: Any, judge: Any, way: Way, batch: list[Case], steps: int
) -> tuple[list[Record], Tensor]:
    """Records and images of one batch of cases; ``steps``: where ``way`` names none."""
    texts = [case.text for case in batch]
    rule = da.AdaptiveGuidance if way.adaptive else da.CFG
    techniques: list[Any] = [rule(way.cfg)] if way.cfg != 1 else []
    if way.nag != 1:
        window = (0.0, math.inf) if way.always else None
        techniques.append(da.NAG(way.nag, negative_prompt=tuple(texts), sigma=window))
    jobs = [
        Job(str(prompts()[c.prompt_id]["prompt"]), seed_of(*c.place), f"{c.prompt_id}-{c.sample}")
        for c in batch
    ]
    call: dict[str, Any] = {"num_inference_steps": way.steps or steps, "guidance_scale": way.cfg}
    if way.negative:
        call["negative_prompt"] = texts
    with Calls(pipe) as calls:
        began = time.process_time()
        results = next(samples(pipe, techniques, jobs, batch=len(jobs), call=call))
        seconds = (time.process_time() - began) / len(batch)
    if way.known is None:
        along, off = effective(pipe, calls.values, way.cfg, texts)
    else:
        off = torch.zeros(len(batch), dtype=torch.float64)
        along = off + way.known
    images = torch.stack([result.image for result in results])
    threshold = judge.thresholds.threshold
    records = []
    for i, (case, detections) in enumerate(zip(batch, judge.detect(images), strict=True)):
        sure = [d for d in detections if d.name == case.wanted and d.score > threshold]
        records.append(
            {"prompt_id": case.prompt_id, "sample": case.sample}
            | case.judged(detections, judge)
            | {"nfe": results[i].report.nfe, "seconds": seconds}
            | {"strength": float(along[i]), "off": float(off[i])}
            | {"colour": sure[0].colour if sure else None}
        )
    return records, images


def mean(records: list[Record], key: str) -> float:
    return sum(float(r[key]) for r in records) / len(records)


def bootstrap(records: list[Record], key: str, base: list[Record] | None = None) -> Any:
    """Of the mean of ``key``, or of its difference to ``base`` image by image; prompts are
    resampled with all their images."""
    values: dict[int, list[float]] = {}
    for r, b in zip(records, base or records, strict=True):
        values.setdefault(r["prompt_id"], []).append(
            float(r[key]) - (float(b[key]) if base else 0.0)
        )
    return interval([sum(v) / len(v) for v in values.values()], ["all"] * len(values))


def row(
    kind: str, way: Way, records: list[Record], matched: tuple[Way, list[Record]] | None
) -> Row:
    """``matched``: CFG's negative prompt at the same effective strength."""
    facts: Row = {
        "negated": kind,
        "method": way.name,
        "NFE": mean(records, "nfe"),
        "effective strength": mean(records, "strength"),
        "off the line": mean(records, "off"),
    }
    for key, head in (("gone", "gone"), ("kept", "other kept"), ("both", "gone and kept")):
        facts[head] = Estimate.of(bootstrap(records, key))
    facts["CFG's negative prompt at equal strength"] = matched and matched[0].name
    facts["gone and kept, difference"] = matched and Estimate.of(
        bootstrap(records, "both", matched[1])
    )
    return facts | {"seconds": mean(records, "seconds")}


def sheet(
    results: dict[tuple[str, Way], list[Record]],
    cases: list[Case],
    ways: list[Way],
    folder: Path,
    file: Path,
    count: int = 6,
) -> None:
    """The first images, in the order of the prompts, whose object was there without negation and
    gone under at least one of ``ways``."""
    chosen = [
        i
        for i in range(len(cases))
        if not results["object", ways[0]][i]["gone"]
        and any(results["object", way][i]["both"] for way in ways[1:])
    ]
    rows, labels = [], []
    for i in chosen[:count]:
        case = cases[i]
        labels.append(f"{prompts()[case.prompt_id]['prompt']}; not: {case.text}")
        pictures = [
            Image.open(
                folder / "object" / w.name.replace(" ", "-") / f"{case.prompt_id}-{case.sample}.png"
            )
            for w in ways
        ]
        rows.append(
            [
                Cell(picture, correct=bool(results["object", w][i]["both"]))
                for picture, w in zip(pictures, ways)
            ]
        )
    columns = [f"{way.name}\n{mean(results['object', way], 'nfe'):.0f} NFE" for way in ways]
    footer = (
        f"The first {len(rows)} of {len(chosen)} images (of {len(cases)}) in which one of the "
        "three removed what was there; same noise."
    )
    contact_sheet(
        rows,
        labels,
        columns,
        title="A negated object: gone, and the other kept?",
        footer=footer,
        size=192,
    ).save(file)


def study(pipe: Any, judge: Any, options: Namespace, bar: Progress) -> None:
    """Tables and pictures ``negation*`` in ``options.output``."""
    scale, few, results, matches = options.scale, options.few, {}, {}
    cases = {"object": objects(), "colour": colours(pipe, judge, options, bar)}
    nags = [Way(nag=5.0)] if few else [Way(nag=s) for s in (3.0, 5.0, 9.0)]
    if not few:
        nags += [Way(nag=s, always=True) for s in (3.0, 5.0)]
        nags += [Way(scale, nag=s) for s in (3.0, 5.0) if scale != 1]
    # a model without guidance has no scale of its own
    scales = [scale] if few else sorted({scale, 2.0, 3.0, 5.0} - {1.0})
    others = list(dict.fromkeys([Way(), Way(scale), *(Way(s, negative=True) for s in scales)]))
    if scale != 1 and not few:
        others.append(Way(scale, negative=True, adaptive=True))
    ways: dict[str, list[Way]] = {}
    for kind, mine in cases.items():
        ways[kind] = list(others)
        for way in (*others, *nags):
            results[kind, way] = collect(pipe, judge, way, mine, kind, options, bar)
            if way.negative and abs(mean(results[kind, way], "strength") - way.cfg) > 1e-3:
                raise SystemExit(
                    f"{way.name} has strength {mean(results[kind, way], 'strength'):.4f}: the "
                    "measure of strength is wrong."
                )
        for way in nags:
            strength = round(mean(results[kind, way], "strength"), 2)
            equal = Way(strength, negative=True)
            short = Way(strength, negative=True, steps=options.steps // 2)
            shorter = way.cfg == 1 and not (way.always or few)
            for extra in (equal, short) if shorter else (equal,):
                results[kind, extra] = collect(pipe, judge, extra, mine, kind, options, bar)
                ways[kind] += [extra] if extra not in ways[kind] else []
            matches[kind, way] = equal
            ways[kind].append(way)
    rows = [
        row(
            kind,
            way,
            results[kind, way],
            (m, results[kind, m]) if (m := matches.get((kind, way))) else None,
        )
        for kind in cases
        for way in ways[kind]
    ]
    facts = {f"{kind} images": len(each) for kind, each in cases.items()}
    save("negation", rows, options, COLUMNS, facts)
    strongest = max(
        (way for way in nags if way.cfg == 1), key=lambda way: mean(results["object", way], "both")
    )
    columns = [Way(), matches["object", strongest], Way(scales[-1], negative=True), strongest]
    folder = Path(options.runs_folder) / model_hash(denoiser_of(pipe))
    sheet(results, cases["object"], columns, folder, Path(options.output) / "negation-images.png")
